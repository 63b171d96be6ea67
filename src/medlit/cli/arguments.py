"""What medlit adds to Lightning's settings: its own arguments, other defaults, and links between model and data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from medlit.cli.environment import ENV_PREFIX, check_variables, check_writable
from medlit.cli.help import Parser
from medlit.cli.renamed import check_renamed
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import check_decoding
from medlit.number_types import NonNegativeInt, PositiveInt
from medlit.predictions.table import FORMATS

PREDICTIONS = "predictions.csv"  # in the run folder, unless --output names another file
SEED = 3407
TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "max_steps": 60,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    # One batch, the longest: enough to fail before the fit rather than after its first 20 steps.
    "num_sanity_val_steps": 1,
    # medlit's samplers distribute the notes; Lightning's would shuffle them again and repeat some.
    "use_distributed_sampler": False,
    # Tensors made in inference mode must not reach a later backward pass through a cache.
    "inference_mode": False,
}
_MONITOR = "val/f1_macro"
_CALLBACK_DEFAULTS = {
    "checkpoint.monitor": _MONITOR,
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    # LastCheckpoint writes last.ckpt.
    "checkpoint.save_last": False,
    "checkpoint.enable_version_counter": False,
    "checkpoint.auto_insert_metric_name": False,
    "early_stopping.monitor": _MONITOR,
    "early_stopping.mode": "max",
    "early_stopping.patience": 10,
    "early_stopping.check_on_train_epoch_end": False,
}
# The answer to a single note is printed in full, so it gets more room than a label needs.
_ONE_NOTE_TOKENS = 64


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add medlit's arguments to those of trainer, model and data, and link what these share."""
    parser.add_argument(
        "--val_every_steps",
        type=PositiveInt,
        default=20,
        help="Optimizer steps between validations; the last step is always validated.",
    )
    parser.add_argument(
        "--log_samples",
        type=NonNegativeInt,
        default=0,
        help="Number of notes of every validation and test to write, with their answers, to samples.jsonl in the run"
        " folder. The file holds patients' text.",
    )
    parser.add_argument(
        "--run_dir",
        type=str | None,
        default=None,
        help="Run folder to write to, and to find 'best' and 'last' in; null: a new one in trainer.default_root_dir,"
        " or that of the checkpoint.",
    )
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    parser.add_lightning_class_args(EarlyStopping, "early_stopping")
    parser.set_defaults(_CALLBACK_DEFAULTS)
    for name in ("base_model", "revision", "max_length"):
        parser.link_arguments(f"model.language_model.{name}", f"data.tokenizer.{name}")
    for name in ("instruction", "mask_prompt", "max_response_tokens"):
        parser.link_arguments(f"data.{name}", f"model.{name}")


def add_predict_arguments(parser: LightningArgumentParser) -> None:
    """Add the arguments that only `medlit predict` has."""
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"File for the predictions; its suffix sets the format ({', '.join(FORMATS)}). null: {PREDICTIONS} in the"
        " run folder. Columns: id; specialty (empty if the answer is not a label, or abstained); answer, as the model"
        " wrote it; its probability, the specialty with the next highest (runner_up) and the margin between them"
        " (all empty in the mode 'generate'); abstained (see model.decoding.abstain_below); cut_tokens, the number of"
        " tokens cut from the note. In CSV, a text that a spreadsheet would run as a formula is preceded by an"
        " apostrophe.",
    )
    parser.add_argument(
        "--resume",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Resume an interrupted run: answer only the notes that it did not answer. Needs the same notes, weights"
        " and settings; devices and batch sizes may differ. Without it, what an interrupted run left is deleted.",
    )
    # Lightning would keep the answers of the whole table in memory.
    parser.set_defaults({"return_predictions": False})


def prepare_predict(config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
    """Check the settings of `medlit predict`, and change those that do not suit a single note.

    Raises:
        UserError: naming the setting.
    """
    if config.output is not None:
        if Path(config.output).suffix not in FORMATS:
            raise UserError(f"output: {config.output} ends in none of {', '.join(FORMATS)}; choose one of these.")
        check_writable("output", Path(config.output))
    check_decoding(config.model.decoding)
    if config.data.predict.text is None:
        return
    if config.output is not None:
        raise UserError("output: the answer to one note is printed; leave out --output or --data.predict.text.")
    if config.resume:
        raise UserError("resume: a single note cannot be resumed; leave out --resume or --data.predict.text.")
    # Only the answer goes to standard output.
    config.trainer.enable_progress_bar = config.trainer.enable_model_summary = config.trainer.logger = False
    # One note needs one process, whatever the config trains on.
    config.trainer.devices = config.trainer.num_nodes = 1
    config.trainer.strategy, config.trainer.plugins = "auto", None
    config.model.decoding.max_new_tokens = max(config.model.decoding.max_new_tokens, _ONE_NOTE_TOKENS)
    config.model.decoding.stop_early = False


def parse_settings(tool: str, args: Sequence[str]) -> Namespace:
    """Parse the settings that a tool shares with `medlit fit`; nothing is built, and no device is needed.

    Args:
        tool: its name, for error messages and environment variables.
        args: flags and config files as for `medlit fit`. Settings that the tool does not use are checked too.

    Raises:
        SystemExit: code 2 if a setting or a value is not understood.
        UserError: a variable of the environment is for this tool and is not a setting, or a setting was renamed.
    """
    check_renamed(args, f"{ENV_PREFIX}_{tool.upper()}__")
    parser = make_parser(tool)
    check_variables({tool: parser})
    return parser.parse_args(list(args))


def make_parser(tool: str) -> ArgumentParser:
    """Make the parser of a tool's settings: those of every verb, without the verb's own arguments."""
    parser = Parser(prog=f"medlit {tool}", default_env=True, env_prefix=f"{ENV_PREFIX}_{tool.upper()}_")
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=SEED)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    parser.add_lightning_class_args(SpecialtyClassifier, "model")
    parser.add_lightning_class_args(TranscriptionDataModule, "data")
    add_arguments(parser)
    return parser


def make_datamodule(config: Namespace) -> TranscriptionDataModule:
    """Make the datamodule that settings describe; it reads nothing yet.

    Raises:
        UserError: a value does not fit.
    """
    types = get_type_hints(TranscriptionDataModule.__init__)
    settings = {
        name: types[name](**vars(value)) if isinstance(value, Namespace) else value
        for name, value in vars(config.data).items()
    }
    return TranscriptionDataModule(**settings)
