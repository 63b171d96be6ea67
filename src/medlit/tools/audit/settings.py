"""The `data` settings of any config, read by the parser of the verbs that train, with nothing built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from medlit.cli import TRAINER_DEFAULTS, MedlitCLI
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.sources import Labels
from medlit.model.module import SpecialtyClassifier
from medlit.preflight import ENV_PREFIX


class _Settings(MedlitCLI):
    """Parses and stops: a config for eight GPUs is audited on a laptop."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's signature
        kwargs |= {"default_env": True, "env_prefix": f"{ENV_PREFIX}_AUDIT_"}
        return LightningCLI.init_parser(self, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _set_seed(self) -> None:
        return

    def before_instantiate_classes(self) -> None:
        return

    def instantiate_classes(self) -> None:
        return

    def after_instantiate_classes(self) -> None:
        return


def data_settings(args: Sequence[str]) -> TranscriptionDataModule:
    """The data module that `--config` files and `--data.*` flags describe; it has read nothing yet.

    Args:
        args: flags and config files as for `medlit fit`; sections other than `data` are checked and left alone.

    Raises:
        SystemExit: code 2 when a key or a value is not understood.
        UserError: a value does not fit.
    """
    parsed = _Settings(
        SpecialtyClassifier,
        TranscriptionDataModule,
        save_config_callback=None,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "medlit audit"},
        run=False,
        args=list(args),
    )
    settings = parsed.config.data.as_dict()
    return TranscriptionDataModule(**settings | {"labels": Labels(**settings["labels"])})
