"""The command line of the verbs that run a model: LightningCLI, from settings to a run and its callbacks.

Precedence of settings, lowest first: defaults, environment variables (`MEDLIT_FIT__MODEL__LORA__R`), config files in
their order, flags. A checkpoint overrides none of them; its metadata is compared with them instead.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from medlit import run_folder as runs
from medlit.atomic_io import explained, read_json
from medlit.callbacks.adapter_folder import AdapterTemperature, DataLink
from medlit.callbacks.last_checkpoint import LastCheckpoint, ValidateLastStep
from medlit.callbacks.memory import MemoryAdvice
from medlit.callbacks.nonfinite import NonfiniteGuard
from medlit.callbacks.predictions import PredictionWriter
from medlit.callbacks.report import RunReport
from medlit.callbacks.run_files import RunLogger, SaveRunFiles
from medlit.callbacks.signals import StopOnSignal
from medlit.callbacks.throughput import ProgressBar, ProgressLog, Throughput
from medlit.cli import arguments, environment, validation
from medlit.cli.help import ABOUT, HelpFormatter, Parser, class_error
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.samplers import micro_batches_per_step
from medlit.data.settings import Tokenizer
from medlit.data.sources import SPLITS
from medlit.errors import UserError, tell
from medlit.model.adapter import adapter_folder
from medlit.model.adapter_metadata import AdapterMetadata, check_metadata, read_fitted
from medlit.model.checkpoints import AtomicCheckpointIO, check_progress, read_checkpoint, set_step
from medlit.model.language_model import check_fp8, default_precision
from medlit.model.module import SpecialtyClassifier
from medlit.paths import local_path
from medlit.predictions.shards import check_table, find_shards
from medlit.predictions.table import PREDICTIONS


class MedlitCLI(LightningCLI):
    """`medlit fit | validate | test | predict`; without a `save_config_callback`, no config of the run is written."""

    def __init__(self, args: list[str], save_config_callback: type[SaveRunFiles] | None = None) -> None:
        environment.silence_warnings()
        verb = self.verb = args[0]
        self._rest = args[1:]
        validation.check_given(self._rest, env_prefix := f"{validation.ENV_PREFIX}_{verb.upper()}__")
        common = {"formatter_class": HelpFormatter, "default_env": True, "env_prefix": validation.ENV_PREFIX}
        form = "[--config FILE ...] [--GROUP.KEY VALUE ...]"
        verbs = {name: common | {"description": text, "usage": f"medlit {name} {form}"} for name, text in ABOUT.items()}
        super().__init__(
            SpecialtyClassifier,
            TranscriptionDataModule,
            save_config_callback=save_config_callback,
            seed_everything_default=arguments.SEED,
            trainer_defaults=arguments.TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs=common | verbs | {"allow_abbrev": False},
            auto_configure_optimizers=False,
            args=[verb, *validation.settle_length(self._rest, env_prefix)],
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add medlit's own arguments."""
        arguments.add_arguments(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        if subcommand != self.verb:  # a full parser takes a fifth of a second
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True} | ({"verbose": False} if subcommand in ("validate", "test") else {}))
        if subcommand == "predict":
            arguments.add_predict_arguments(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse and check the settings, and refuse environment variables that are not settings."""
        of_verb = self._subcommand_parsers[self.verb]
        validation.check_variables(self.verb, of_verb)  # before parsing, since --print_config ends the process
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        validation.check_settings(self.config[self.verb], of_verb, fit=self.verb == "fit")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters found in a checkpoint override the user's flags.
        return

    def before_instantiate_classes(self) -> None:
        """Check the machine, and derive the settings that depend on it and on earlier runs."""
        config = self.config[self.subcommand]
        trainer = config.trainer
        if self.subcommand == "fit" and not config.config:
            tell(f"no --config: a fit of {config.model.language_model.base_model} on the notes {config.data.source}")
        environment.check_device(trainer.accelerator, trainer.devices)
        validation.adopt_adapter(config, self._rest, str(self.subcommand))
        if trainer.precision is None:
            on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
            trainer.precision = default_precision(on_gpu, config.model.language_model.dtype)
        if self.subcommand == "predict":
            arguments.prepare_predict(config)
        environment.check_slurm(trainer.plugins)
        self.run_folder = self._choose_run(config)
        self._check_outputs(config)
        key = "run_dir" if config.run_dir else "trainer.default_root_dir"
        environment.check_writable(key, self.run_folder / "checkpoints")

    def _check_outputs(self, config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
        overwrite, config.overwrite = config.overwrite, False  # the recorded config does not allow it again
        if self.subcommand == "predict":
            if config.data.predict.text is not None:
                return
            sources = {config.data.source, config.data.predict.source} - {*SPLITS, "builtin"}
            check_table(Path(config.output or self.run_folder / PREDICTIONS), sources, overwrite)
        is_fit, adapter = self.subcommand == "fit", self.run_folder / "adapter"
        if is_fit and config.model.adapter and adapter.resolve() == Path(config.model.adapter).expanduser().resolve():
            raise UserError(f"run_dir: the fit would replace its own model.adapter {adapter}; name another folder.")
        resumes = is_fit and config.ckpt_path and runs.run_of(Path(config.ckpt_path)) == self.run_folder
        if not (overwrite or resumes or config.trainer.fast_dev_run):
            runs.check_replaceable(self.run_folder, str(self.subcommand))

    def _choose_run(self, config: Any) -> Path:  # noqa: ANN401 - jsonargparse's Namespace
        """Resolve `best` and `last`, and choose the folder for this verb's files."""
        root = Path(config.trainer.default_root_dir)
        name = runs.run_name([str(path) for path in config.config or []])
        run = local_path("run_dir", config.run_dir) if config.run_dir else None
        if config.ckpt_path is not None:
            path = runs.resolve_checkpoint(config.ckpt_path, root, name, run)
            config.ckpt_path = str(path)
            run = run or runs.run_of(path)
        elif self.subcommand != "fit":
            environment.check_weights_named(run, config.model)
        if run is None and self.subcommand == "predict" and config.resume and config.output is None:
            run = next((run for run in runs.versions(root, name) if find_shards(run / PREDICTIONS)), None)
        self._is_numbered = run is None
        return run or runs.next_version(root, name)

    def instantiate_classes(self) -> None:
        """Build what the settings describe; a class that they name may not be installed, or refuse its arguments."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (reason := class_error(str(error))) is None:
                raise
            raise UserError(f"trainer: {reason}; leave it out, or install or set what it needs.") from error
        of = self.model.language_model
        self.datamodule.tokenizer = Tokenizer(of.base_model, of.revision, of.max_length)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401
        """Build the trainer with medlit's callbacks; it gets its logger with its folder."""
        config = self.config[self.subcommand]
        if config.trainer.logger in (None, True):
            kwargs["logger"] = False
        one_note = self.subcommand == "predict" and config.data.predict.text is not None
        if one_note:
            self.save_config_callback = None
        self.trainer_defaults = {"callbacks": self._make_callbacks(config, one_note)}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            # Only Lightning's Trainer checks whether its settings fit together, and what they need is installed.
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _make_callbacks(self, config: Any, one_note: bool) -> list[L.Callback]:  # noqa: ANN401
        self.memory, self.report = MemoryAdvice(), RunReport()
        output = Path(config.get("output") or self.run_folder / PREDICTIONS)
        self.predictions = PredictionWriter(output, one_note, bool(config.get("resume")), config.ckpt_path)
        callbacks: list[L.Callback] = [
            DataLink(),
            ValidateLastStep(),
            last := LastCheckpoint(),
            self.predictions,
            StopOnSignal(last),
            NonfiniteGuard(config.model.optimizer.on_nonfinite),
            self.memory,
            self.report,
            AdapterTemperature(),
            Throughput(),
        ]
        given = self.config_init[self.subcommand].trainer
        named = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks] if given.callbacks else []
        others = [each for each in named if not isinstance(each, LightningProgressBar)]
        if given.enable_progress_bar is None and others == named and not sys.stdout.isatty():
            given.enable_progress_bar = False
            callbacks.append(ProgressLog())
        elif given.enable_progress_bar is False:
            given.callbacks = others
        elif others == named:
            callbacks.append(ProgressBar())
        return callbacks

    def after_instantiate_classes(self) -> None:
        """Derive accumulation and the validation interval, both counted in micro-batches, from the optimizer step."""
        trainer: Any = self.trainer
        trainer.callbacks.sort(key=lambda each: isinstance(each, LightningProgressBar))  # show what `Throughput` sets
        environment.check_processes(trainer)
        if (path := self.config[self.subcommand].ckpt_path) is not None:
            checkpoint = read_checkpoint(Path(path))
            theirs = AdapterMetadata.from_dict(checkpoint.get("medlit"), f"ckpt_path: {path}")
            check_metadata(self.model.metadata, theirs, source=f"the checkpoint {path}")
            if theirs.inference and (own := theirs.inference.max_length) != self.model.language_model.max_length:
                tell(f"model.language_model.max_length: {own:,} in the fit of the weights; notes are cut elsewhere now")
            if self.subcommand == "fit":
                check_progress(checkpoint, trainer.fit_loop.state_dict(), Path(path))
            else:
                set_step(trainer, checkpoint)
        adapter = None if self.model.adapter is None else adapter_folder(self.model.adapter)
        decoding = self.model.decoding
        *_, prior = read_fitted(path, adapter, decoding, complete=self.subcommand in ("test", "predict"))
        if decoding.prior is not None and prior is None and self.subcommand != "fit" and (path or adapter):
            why = "these weights have none" if decoding.uses_prior else "'generate' uses none"
            tell(f"model.decoding.prior: {why}, so the language model answers alone")
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.subcommand != "fit":
            return  # an evaluation may use any number of processes
        check_fp8(self.model.language_model, self.model.lora, trainer.strategy.root_device)
        trainer.accumulate_grad_batches = micro_batches_per_step(self.datamodule.batching, trainer.world_size)
        steps = self.config[self.subcommand].val_every_steps
        if steps is not None:  # else once a pass, see ValidateLastStep
            trainer.val_check_interval = steps * trainer.accumulate_grad_batches
        # Count over the whole fit; an epoch need not be a multiple of the interval.
        trainer.check_val_every_n_epoch = None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb in its folder, which the first process makes; only the trainer says which one that is."""
        config, trainer, is_new = self.config[subcommand], self.trainer, False
        writes = not self.predictions.to_stdout and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and trainer.is_global_zero:
            self.run_folder, is_new = runs.claim(self.run_folder, self._is_numbered)
        with environment.clean_up_on_failure(trainer, self.run_folder, existed=not is_new), ExitStack() as stack:
            if writes and trainer.is_global_zero and subcommand == "fit":
                stack.enter_context(runs.sole_fit(self.run_folder, config.ckpt_path))
            # All files go to this folder, whatever the loggers.
            trainer._default_root_dir = str(self.run_folder)  # type: ignore[attr-defined]  # it has no setter
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.run_folder / "checkpoints")
            if writes and config.trainer.logger in (None, True) and subcommand != "predict":  # which logs no scalar
                trainer.logger = RunLogger(self.run_folder, in_fit=subcommand == "fit")
            if not config.get("output"):
                self.predictions.path = self.run_folder / PREDICTIONS
            try:
                super()._run_subcommand(subcommand)
            except MisconfigurationException as error:  # what Lightning finds only once notes or callbacks are there
                raise UserError(f"trainer: {' '.join(str(error).split())}") from error
            except torch.OutOfMemoryError as error:
                raise self.memory.out_of_memory_error(self.model, self.datamodule) from error
            except torch._dynamo.exc.BackendCompilerFailed as error:  # a fault of PyTorch's or of Unsloth's
                base = config.model.language_model.base_model
                fault = f"PyTorch {torch.__version__} does not compile the layers of {base}"
                remedy = "set TORCHDYNAMO_DISABLE=1, or choose another base model"
                raise UserError(f"model.language_model.base_model: {fault}; {remedy}.") from error
            except RuntimeError as error:
                if "find_unused_parameters" not in str(error):
                    raise
                fault = "a step has not used all adapters, which several processes cannot train"
                remedy = "name layers that every note uses, or set trainer.devices to 1"
                raise UserError(f"model.lora.target_modules: {fault}; {remedy}.") from error
        if (written := self.predictions.written or self.report.written) is not None:
            if subcommand == "fit":
                run = shlex.quote(str(written))
                of_run = f"--config {run}/config_fit.yaml --run_dir {run} --ckpt_path best"
                tell(f"best weights: {run}/adapter")
                tell(f"next, for report.html: medlit test {of_run}")
                tell(f"next, for new notes: medlit predict {of_run} --data.predict.source new.csv")
            tell(f"written: {written}")


def main(args: Sequence[str] | None = None) -> MedlitCLI:
    """Run a verb with these arguments, by default those of the process; a user's mistake ends it with code 2."""
    try:
        with explained():  # Lightning and its loggers write files too
            return MedlitCLI(list(sys.argv[1:] if args is None else args), SaveRunFiles)
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class Run(NamedTuple):
    """A finished fit or test: its folder, the metrics of its last validation or of the test, best adapter, figures."""

    run_dir: Path
    metrics: dict[str, Any]
    adapter: Path
    figures: list[Path]

    def test(self, **overrides: Any) -> "Run":  # noqa: ANN401 - as a YAML has them
        """Run `medlit test` on the best weights into the same folder, with the fit's settings and these over them."""
        config = self.run_dir / "config_fit.yaml"
        return _run("test", _flags(config, {"run_dir": self.run_dir, "ckpt_path": "best"} | overrides))


def fit(config: str | Path | Sequence[str | Path], **overrides: Any) -> Run:  # noqa: ANN401
    """Run `medlit fit` in this process, with its settings, its checks and its files.

    Args:
        config: a config file, or several, of which later ones win.
        overrides: settings over the configs, with two underscores for a dot: `trainer__max_steps=20`.

    Raises:
        UserError: what the command ends with exit code 2 for.
    """
    return _run("fit", _flags(config, overrides))


def datamodule(config: str | Path | Sequence[str | Path], **overrides: Any) -> TranscriptionDataModule:  # noqa: ANN401
    """The notes and the prompt of a `fit` with these arguments; nothing is read before it is used."""
    return arguments.make_datamodule(arguments.parse_settings("fit", _flags(config, overrides)))


def _flags(config: str | Path | Sequence[str | Path], overrides: dict[str, Any]) -> list[str]:
    configs = [config] if isinstance(config, str | Path) else config
    flags = {f"--{name.replace('__', '.')}": value for name, value in overrides.items()}
    given = [f"{name}={value if isinstance(value, str | Path) else json.dumps(value)}" for name, value in flags.items()]
    return [*(f"--config={path}" for path in configs), *given]


def _run(verb: str, flags: list[str]) -> Run:
    with explained():  # in a copy of the context, where jsonargparse leaves its parser and so the model
        run = copy_context().run(MedlitCLI, [verb, *flags], SaveRunFiles).run_folder
    metrics = read_json(run / f"{verb}_metrics.json") if run.exists() else {}  # a trial run leaves nothing
    return Run(run, metrics, run / "adapter", sorted(run.glob("*.png")))
