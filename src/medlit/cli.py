"""The command line of the verbs that run a model: LightningCLI with medlit's links, defaults and manners.

What counts, weakest first: defaults, environment variables (`MEDLIT_FIT__MODEL__LORA__R`), config files in their order,
flags. A checkpoint remembers nothing that could override them; its structure is compared instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medlit.callbacks.adapter import AdapterFolder
from medlit.callbacks.config import SaveConfig
from medlit.callbacks.finite import FiniteSteps
from medlit.callbacks.folder import RunLogger
from medlit.callbacks.last import LastCheckpoint
from medlit.callbacks.last_step import LastStep
from medlit.callbacks.memory import MemoryWatch
from medlit.callbacks.notes_bar import NotesProgressBar
from medlit.callbacks.others import end_others, watch_others
from medlit.callbacks.predictions import FORMATS, PredictionWriter
from medlit.callbacks.report import RunReport
from medlit.callbacks.samples import Samples
from medlit.callbacks.signals import StopOnSignal
from medlit.callbacks.split import SplitRecord
from medlit.callbacks.temperature import AdapterTemperature
from medlit.callbacks.throughput import Throughput
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.manual_texts import ABOUT
from medlit.model.answering import F1_MACRO
from medlit.model.checkpoints import WholeCheckpoints
from medlit.model.module import SpecialtyClassifier
from medlit.model.precision import default_precision
from medlit.parser import Parser
from medlit.predictions.parts import find_parts
from medlit.preflight import (
    ENV_PREFIX,
    check_checkpoint,
    check_decoding,
    check_device,
    check_environment,
    check_settings,
    check_slurm,
    check_writable,
)
from medlit.quiet import quiet
from medlit.runs import next_version, resolve_checkpoint, run_name, run_of, unwritable, versions

MONITOR = f"val/{F1_MACRO}"
ONE_NOTE_TOKENS = 64
PREDICTIONS = "predictions.csv"
TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "max_steps": 60,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    # One batch, the longest: enough to fail before the fit rather than after its first 20 steps.
    "num_sanity_val_steps": 1,
    # The samplers deal notes to processes themselves; Lightning would shuffle and repeat some.
    "use_distributed_sampler": False,
    # Tensors made under inference mode must not enter a later backward pass through a cache.
    "inference_mode": False,
}
# What every command line of settings is made of, whatever is then done with them.
PARTS: dict[str, Any] = {
    "model_class": SpecialtyClassifier,
    "datamodule_class": TranscriptionDataModule,
    "parser_class": Parser,
    "trainer_defaults": TRAINER_DEFAULTS,
    "auto_configure_optimizers": False,
}


class MedlitCLI(LightningCLI):
    """`medlit fit | validate | test | predict`."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's signature
        """Let every parser read the environment."""
        return super().init_parser(default_env=True, env_prefix=ENV_PREFIX, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is neither the trainer's, the model's nor the data's, and link what two of them share."""
        parser.add_argument(
            "--val_every_steps",
            type=int,
            default=20,
            help="Validate after so many optimizer steps, and after the last.",
        )
        parser.add_argument(
            "--log_samples",
            type=NonNegativeInt,
            default=0,
            help="Write so many notes of every validation and test, with their answers, to samples.jsonl in the run"
            " folder. The file holds patients' text.",
        )
        parser.add_argument(
            "--run", type=str | None, default=None, help="Run folder to look for 'best' and 'last' in, and to write to."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "checkpoint.monitor": MONITOR,
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                # LastCheckpoint writes last.ckpt.
                "checkpoint.save_last": False,
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
                "early_stopping.monitor": MONITOR,
                "early_stopping.mode": "max",
                "early_stopping.patience": 10,
                "early_stopping.check_on_train_epoch_end": False,
            }
        )
        parser.link_arguments("model.backbone.base_model", "data.base_model")
        parser.link_arguments("model.backbone.revision", "data.base_revision")
        parser.link_arguments("model.backbone.max_length", "data.max_length")
        parser.link_arguments("data.instruction", "model.instruction")
        parser.link_arguments("data.keep", "model.keep")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        if subcommand == "predict":
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
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse environment variables that no setting reads."""
        check_environment(self._subcommand_parsers)  # first: --print_config ends the process
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters found in a checkpoint override the user's flags.
        return

    # --- before anything is built -------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Settle what depends on the machine and on earlier runs."""
        config = self.config[self.subcommand]
        trainer = config.trainer
        check_device(trainer.accelerator, trainer.devices)
        check_settings(config)
        if trainer.precision is None:
            trainer.precision = default_precision(trainer.accelerator != "cpu" and torch.cuda.is_available())
        if self.subcommand == "predict":
            self._prepare_predict(config)
        check_slurm(trainer.plugins)
        self.run_folder = self._choose_run(config)
        check_writable("run" if config.run else "trainer.default_root_dir", self.run_folder / "checkpoints")

    def _prepare_predict(self, config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
        if config.output is not None:
            if Path(config.output).suffix not in FORMATS:
                raise UserError(f"output: {config.output} ends in none of {', '.join(FORMATS)}; name the file so.")
            check_writable("output", Path(config.output))
        check_decoding(config.model.decoding)
        if config.resume and config.data.text is not None:
            raise UserError("resume: one note has nothing to go on with; leave out --resume or --data.text.")
        if config.data.text is not None:
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

    def _choose_run(self, config: Any) -> Path:  # noqa: ANN401
        """Resolve `best` and `last` and pick the folder for this verb's files."""
        root = Path(config.trainer.default_root_dir)
        name = run_name([str(path) for path in config.config or []])
        run = Path(config.run) if config.run else None
        if config.ckpt_path is not None:
            path = resolve_checkpoint(config.ckpt_path, root, name, run)
            config.ckpt_path = str(path)
            run = run or run_of(path)
        if run is None and self.subcommand == "predict" and config.resume and config.output is None:
            run = next((run for run in versions(root, name) if find_parts(run / PREDICTIONS)), None)
        return run or next_version(root, name)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401
        """Build the trainer with its logger and medlit's callbacks."""
        config = self.config[self.subcommand]
        folder = self.run_folder
        if config.trainer.logger in (None, True):
            kwargs["logger"] = RunLogger(
                save_dir=folder.parent.parent, name=folder.parent.name, version=folder.name, default_hp_metric=False
            )
        kwargs["default_root_dir"] = str(folder)
        self.memory = MemoryWatch()
        self.save_config_kwargs = {"save_to_log_dir": False}
        one_note = self.subcommand == "predict" and config.data.text is not None
        if one_note:
            self.save_config_callback = None
        output = config.get("output")
        callbacks: list[L.Callback] = [
            LastStep(),
            AdapterFolder(config.checkpoint.monitor, config.checkpoint.mode),
            last := LastCheckpoint(),
            StopOnSignal(last),
            FiniteSteps(config.model.optimizer.on_nonfinite),
            self.memory,
            RunReport(),
            AdapterTemperature(),
            SplitRecord(),
            Throughput(),
            PredictionWriter(
                Path(output) if output else folder / PREDICTIONS, one_note, bool(config.get("resume")), config.ckpt_path
            ),
        ]
        if config.log_samples:
            callbacks.append(Samples(config.log_samples))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(NotesProgressBar())
        self.trainer_defaults = {"callbacks": callbacks}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            # Lightning looks at its settings together, and here alone.
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def after_instantiate_classes(self) -> None:
        """Derive accumulation and the validation interval, both counted in micro-batches, from the optimizer step."""
        ckpt_path = self.config[self.subcommand].ckpt_path
        trainer = self.trainer
        if ckpt_path is not None:
            fit_loop = trainer.fit_loop.state_dict() if self.subcommand == "fit" else None
            check_checkpoint(Path(ckpt_path), self.model.structure, fit_loop)
        trainer.strategy.checkpoint_io = WholeCheckpoints()
        watch_others(trainer)
        if self.subcommand != "fit":
            return  # to answer, any number of processes may share the notes
        trainer.accumulate_grad_batches = self.datamodule.micro_batches_per_step(trainer.world_size)
        trainer.val_check_interval = self.config[self.subcommand].val_every_steps * trainer.accumulate_grad_batches
        # Count over the whole fit; an epoch need not be a multiple of the interval.
        trainer.check_val_every_n_epoch = None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; one that ends in a user's mistake leaves the run folder as it was."""
        folder, existed = self.run_folder, self.run_folder.exists()
        events = set(folder.glob("events.out.tfevents.*"))
        try:
            self._run_verb(subcommand)
        except BaseException as error:
            failed = end_others(self.trainer, error)
            if isinstance(error, UserError) or (failed and failed[1] == 2):
                self._undo(folder, existed, events)
            if failed:
                print(f"medlit: {failed[0]}", file=sys.stderr)
                raise SystemExit(failed[1]) from error
            raise

    def _run_verb(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except torch.OutOfMemoryError as error:
            raise self.memory.told(self.model.backbone, self.datamodule) from error

    def _undo(self, folder: Path, existed: bool, events: set[Path]) -> None:
        if self.trainer.is_global_zero and existed:
            # Another verb may be running here: only the file that this process's logger made.
            for path in set(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*")) - events:
                path.unlink()
        elif self.trainer.is_global_zero and not _worth_keeping(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in (folder.parent, folder.parent.parent):
                with contextlib.suppress(OSError):  # it has other runs
                    parent.rmdir()


def _worth_keeping(folder: Path) -> bool:
    """Whether a run folder holds weights or answers that a verb can go on with."""
    return (folder / "checkpoints").exists() or bool(find_parts(folder / PREDICTIONS))


def main(args: Sequence[str] | None = None) -> MedlitCLI:
    """Run a verb.

    Args:
        args: command line arguments; by default those of the process.

    Raises:
        SystemExit: code 2 after a user's mistake, told in one sentence on standard error; 128 + its number after a
            signal.
    """
    quiet()
    try:
        return MedlitCLI(
            **PARTS,
            save_config_callback=SaveConfig,
            seed_everything_default=3407,
            parser_kwargs={verb: {"description": text} for verb, text in ABOUT.items()},
            args=list(sys.argv[1:] if args is None else args),
        )
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except SIGTERMException as stop:  # in a fit StopOnSignal is before it
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from stop
        raise
    except OSError as error:
        # Lightning and its loggers write too.
        told = unwritable(error)
        if told is None:
            raise
        print(f"medlit: {told}", file=sys.stderr)
        raise SystemExit(2) from error
