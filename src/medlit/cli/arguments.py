"""What medlit adds to Lightning's settings: its own arguments, other defaults, and links between model and data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser

from medlit.callbacks.adapter_folder import BestCheckpoint
from medlit.cli import validation
from medlit.cli.environment import check_writable, silence_warnings
from medlit.cli.help import OWN_HELP, Parser
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.settings import Tokenizer
from medlit.errors import UserError
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import check_decoding
from medlit.number_types import PositiveInt
from medlit.paths import local_path
from medlit.predictions.table import FORMATS, PREDICTIONS

SEED = 3407
_DEFAULTS = yaml.safe_load(Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8"))
TRAINER_DEFAULTS: dict[str, Any] = _DEFAULTS["trainer"]
_ONE_NOTE_TOKENS = 64  # the answer to a single note is printed in full, so it gets more room than a label needs


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add medlit's arguments to those of trainer, model and data, and link what these share."""
    parser.add_argument("--val_every_steps", type=PositiveInt | None, default=20, help=OWN_HELP["val_every_steps"])
    parser.add_argument("--run_dir", type=str | None, default=None, help=OWN_HELP["run_dir"])
    parser.add_argument("--overwrite", type=bool, nargs="?", const=True, default=False, help=OWN_HELP["overwrite"])
    parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
    parser.add_lightning_class_args(EarlyStopping, "early_stopping")
    parser.set_defaults(_DEFAULTS["callbacks"])
    for name in ("instruction", "mask_prompt", "max_response_tokens"):
        parser.link_arguments(f"data.{name}", f"model.{name}")
    parser.link_arguments("data.prompt_format", "model.language_model.prompt_format")
    sizes = ("data.batching.token_budget", "data.batching.micro_batch_size", "model.language_model.max_length")
    parser.link_arguments(
        sizes, "model.language_model.batch_tokens", lambda budget, notes, length: budget or notes * length // 2
    )


def add_predict_arguments(parser: LightningArgumentParser) -> None:
    """Add the arguments that only `medlit predict` has."""
    output_help = OWN_HELP["output"].format(formats=", ".join(FORMATS), predictions=PREDICTIONS)
    parser.add_argument("--output", type=str | None, default=None, help=output_help)
    parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=OWN_HELP["resume"])
    # Lightning would keep the answers of the whole table in memory.
    parser.set_defaults({"return_predictions": False})


def prepare_predict(config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
    """Check the settings of `medlit predict`, and change those that do not suit a single note."""
    if config.output is not None:
        output = local_path("output", config.output)
        if output.suffix not in FORMATS:
            raise UserError(f"output: {output} ends in none of {', '.join(FORMATS)}; choose one of these.")
        check_writable("output", output)
        config.output = str(output)
    check_decoding(config.model.decoding)
    if config.data.predict.text is None:
        return
    if config.output is not None:
        raise UserError("output: the answer to one note is printed; leave out --output or --data.predict.text.")
    if config.resume:
        raise UserError("resume: a single note cannot be resumed; leave out --resume or --data.predict.text.")
    config.trainer.enable_progress_bar = config.trainer.enable_model_summary = config.trainer.logger = False
    config.trainer.devices = config.trainer.num_nodes = 1  # whatever the config trains on
    config.trainer.strategy, config.trainer.plugins = "auto", None
    config.model.decoding.max_new_tokens = max(config.model.decoding.max_new_tokens, _ONE_NOTE_TOKENS)
    config.model.decoding.stop_early = False


def parse_settings(tool: str, args: Sequence[str]) -> Namespace:
    """Parse the settings that a tool shares with `medlit fit`; those that it does not use are checked too."""
    silence_warnings()
    validation.check_given(args, env_prefix := f"{validation.ENV_PREFIX}_{tool.upper()}__")
    parser = make_parser(tool)
    validation.check_variables(tool, parser)
    config = parser.parse_args(validation.settle_length(args, env_prefix))
    validation.check_settings(config, parser)
    return config


def make_parser(tool: str) -> ArgumentParser:
    """Make the parser of a tool's settings: those of every verb, without the verb's own arguments."""
    env_prefix = f"{validation.ENV_PREFIX}_{tool.upper()}_"
    parser = Parser(prog=f"medlit {tool}", default_env=True, env_prefix=env_prefix, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=SEED)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    parser.add_lightning_class_args(SpecialtyClassifier, "model")
    parser.add_lightning_class_args(TranscriptionDataModule, "data")
    add_arguments(parser)
    return parser


def make_datamodule(config: Namespace) -> TranscriptionDataModule:
    """Make the datamodule that settings describe; it reads nothing yet."""
    parser = ArgumentParser()
    parser.add_class_arguments(TranscriptionDataModule, "data")
    data: TranscriptionDataModule = parser.instantiate_classes(Namespace(data=config.data)).data  # type: ignore[no-untyped-call]
    of = config.model.language_model
    data.tokenizer = Tokenizer(of.base_model, of.revision, of.max_length)
    return data
