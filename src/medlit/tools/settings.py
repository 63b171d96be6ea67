"""The settings of any config, read by the parser of the verbs that train, with nothing built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from medlit.cli.cli import PARTS, MedlitCLI
from medlit.cli.environment import ENV_PREFIX, check_environment
from medlit.data.datamodule import TranscriptionDataModule


class _Settings(MedlitCLI):
    """Parses and stops: a config for eight GPUs is audited on a laptop."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's signature
        tool = kwargs["prog"].rpartition(" ")[2]
        kwargs |= {"default_env": True, "env_prefix": f"{ENV_PREFIX}_{tool.upper()}_"}
        return LightningCLI.init_parser(self, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        check_environment({parser.prog.rpartition(" ")[2]: parser})
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _set_seed(self) -> None:
        return

    def before_instantiate_classes(self) -> None:
        return

    def instantiate_classes(self) -> None:
        return

    def after_instantiate_classes(self) -> None:
        return


def settings(tool: str, args: Sequence[str]) -> Any:  # noqa: ANN401 - jsonargparse's Namespace
    """What `--config` files, flags and the environment say.

    Args:
        tool: its name, for `--help` and for the environment's variables.
        args: flags and config files as for `medlit fit`; a section of no use to the tool is checked too.

    Raises:
        SystemExit: code 2 when a key or a value is not understood.
        UserError: a variable of the environment is for this tool and names no setting.
    """
    parsed = _Settings(
        **PARTS,
        save_config_callback=None,
        parser_kwargs={"prog": f"medlit {tool}"},
        run=False,
        args=list(args),
    )
    return parsed.config


def data_module(config: Any) -> TranscriptionDataModule:  # noqa: ANN401
    """The data module that settings describe; it has read nothing yet.

    Raises:
        UserError: a value does not fit.
    """
    parser = ArgumentParser()
    parser.add_class_arguments(TranscriptionDataModule, "data")
    return parser.instantiate_classes(Namespace(data=config.data)).data  # type: ignore[no-any-return]
