"""What `medlit predict` has of its own: arguments, what they must be, and what one note alone needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from medlit.callbacks.predictions import FORMATS
from medlit.cli.environment import check_writable
from medlit.cli.validation import check_decoding
from medlit.errors import UserError

PREDICTIONS = "predictions.csv"
ONE_NOTE_TOKENS = 64


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add where predictions go and whether an interrupted run goes on."""
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"Where predictions go; the name's end chooses the format ({', '.join(FORMATS)}). By default"
        " predictions.csv in the run folder. Columns: id; specialty (empty: the answer is not on the list, or"
        " abstained); answer as the model wrote it; its probability, its margin to the runner_up and that"
        " specialty (empty in the mode 'generate'); abstained (see model.decoding.abstain_below); cut_tokens,"
        " which the model did not see. In CSV a text that a spreadsheet would run as a formula gets an"
        " apostrophe before it.",
    )
    parser.add_argument(
        "--resume",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Go on with a run that was interrupted, killed too, and ask only about the notes that it had not"
        " answered. Needs the same notes, weights and settings; devices and batch sizes may be others. Without"
        " it, what an interrupted run left is thrown away.",
    )
    # Every answer of a table of a million notes would stay in memory.
    parser.set_defaults({"return_predictions": False})


def prepare(config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
    """Check the settings, and change those that one note alone wants otherwise.

    Raises:
        UserError: naming the key.
    """
    if config.output is not None:
        if Path(config.output).suffix not in FORMATS:
            raise UserError(f"output: {config.output} ends in none of {', '.join(FORMATS)}; name the file so.")
        check_writable("output", Path(config.output))
    check_decoding(config.model.decoding)
    if config.data.predict.text is None:
        return
    if config.output is not None:
        raise UserError("output: the answer to one note is printed; leave out --output or --data.predict.text.")
    if config.resume:
        raise UserError("resume: one note has nothing to go on with; leave out --resume or --data.predict.text.")
    # Standard output belongs to the answer alone.
    config.trainer.enable_progress_bar = False
    config.trainer.enable_model_summary = False
    config.trainer.logger = False
    # One note is work for one process, whatever the config trains on.
    config.trainer.devices = config.trainer.num_nodes = 1
    config.trainer.strategy, config.trainer.plugins = "auto", None
    # Somebody wants to read what the model says, all of it.
    config.model.decoding.max_new_tokens = max(config.model.decoding.max_new_tokens, ONE_NOTE_TOKENS)
    config.model.decoding.stop_early = False
