"""Write a run's metrics, answers, figures and test report, and show them in TensorBoard."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imsave

from medlit.atomic_io import atomic_write, write_json
from medlit.callbacks.run_files import run_folder
from medlit.errors import best_effort, tell
from medlit.evaluation.metrics import HEADLINE, HYPERPARAMETERS, applicable, uncertainty
from medlit.evaluation.sets import doubts_of_coverage
from medlit.model.module import SpecialtyClassifier
from medlit.report.figures import confusion_figure, pixels
from medlit.report.page import write_report
from medlit.report.systems import BASE_WEIGHTS, FACTS, data_facts, package_versions


class RunReport(L.Callback):
    """Writes metrics, answers and confusion matrix of `fit`, `validate` and `test`, and the report of a test.

    During a fit every validation replaces `fit_metrics.json`, `fit_answers.parquet` and `confusion_fit.png`.
    """

    written: Path | None = None  # their folder, on the first process; None before, and in a trial run
    _doubts: str | None = None  # why a coverage may not be reached; None: not looked for yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Turn failures of loggers, medlit's or a user's, into warnings, so that none ends the run."""
        for logger in trainer.loggers:
            for name in ("log_hyperparams", "log_metrics", "save", "after_save_checkpoint", "finalize"):
                setattr(logger, name, best_effort(f"the logs of {type(logger).__name__}")(getattr(logger, name)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: SpecialtyClassifier) -> None:  # type: ignore[override]
        """Log the settings, even if the fit fails later."""
        for logger in trainer.loggers:
            logger.log_hyperparams(hyperparameters(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: SpecialtyClassifier) -> None:  # type: ignore[override]
        """Report a validation or a test, but not the sanity check."""
        if trainer.sanity_checking:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if pl_module.scores is None or pl_module.results is None:
            return
        subcommand, scores = trainer.state.fn.value, pl_module.scores  # type: ignore[union-attr]
        loss = float(trainer.callback_metrics[f"{pl_module.stage}/loss"])
        # The files are the purpose of `validate` and `test`; a fit can do without them.
        with best_effort("the metrics of its validations") if subcommand == "fit" else nullcontext():
            metrics: dict[str, Any] = {**scores, **uncertainty(pl_module.results, pl_module.temperature), "loss": loss}
            metrics |= {"sets": pl_module.sets} if pl_module.sets else {}
            pl_module.results.write(folder / f"{subcommand}_answers.parquet")
            write_json(folder / f"{subcommand}_metrics.json", metrics)
        coverage = pl_module.decoding.coverage
        if coverage is not None and subcommand != "test" and self._doubts is None:  # the notes stay the same
            train = trainer.datamodule.read_splits().notes.get("train")  # type: ignore[attr-defined]
            trained = () if train is None else train["text_hash"][:]
            self._doubts = doubts_of_coverage(coverage, pl_module.results, trained)
            if self._doubts:
                tell(self._doubts)
        what = f"validation at step {trainer.global_step}" if subcommand == "fit" else subcommand
        shown = ", ".join(f"{metric.title} {metric.value(scores)}" for metric in applicable(HEADLINE, scores))
        tell(title := f"{what}: {shown}, {scores['n']} notes")
        figures = {}
        with best_effort("the confusion matrix"), atomic_write(folder / f"confusion_{subcommand}.png") as path:
            figures["confusion"] = pixels(confusion_figure(pl_module.results, title))
            imsave(path, figures["confusion"])
        if subcommand == "test":
            with best_effort("the report of the test"):
                write_json(folder / FACTS, _facts(trainer, pl_module))
                figures |= {key: pixels(each) for key, each in write_report(folder).items() if key not in figures}
                if "sets" in figures:
                    with atomic_write(folder / "sets_test.png") as path:
                        imsave(path, figures["sets"])
            self.on_fit_end(trainer, pl_module)
        with best_effort("the figures in TensorBoard"):
            for logger in (each for each in trainer.loggers if isinstance(each, TensorBoardLogger)):
                for name, image in figures.items():
                    tag = f"{pl_module.stage}/{name}"
                    logger.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")
        self.written = folder

    on_test_end = on_validation_end  # type: ignore[assignment]

    def on_fit_end(self, trainer: L.Trainer, pl_module: SpecialtyClassifier) -> None:  # type: ignore[override]
        """Log the settings with their results."""
        metrics = trainer.callback_metrics
        names = [f"{pl_module.stage}/{name}" for name in HYPERPARAMETERS]
        results = {f"hparams/{name}": float(metrics[name]) for name in names if name in metrics}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(hyperparameters(pl_module), results, step=trainer.global_step)


def hyperparameters(module: SpecialtyClassifier) -> dict[str, Any]:
    """The module's settings as plain types, for TensorBoard's table of hyperparameters."""
    return {
        "language_model": asdict(module.language_model),
        "lora": None if module.lora is None else asdict(module.lora),
        "optimizer": asdict(module.optimizer_settings),
        "decoding": asdict(module.decoding),
        "adapter": module.adapter,
    }


def _facts(trainer: L.Trainer, module: SpecialtyClassifier) -> dict[str, Any]:
    """What the report shows besides metrics."""
    return {
        "data": data_facts(trainer.datamodule),  # type: ignore[attr-defined]
        "run": {
            "base model": module.language_model.base_model,
            "revision": module.language_model.revision,
            "weights": trainer.ckpt_path or module.adapter or BASE_WEIGHTS,
            "decoder": module.decoding.mode,
            "temperature": module.temperature,
            "TF-IDF prior": None if module.prior is None else f"to the power {module.prior.power:.2f}",
            "precision": str(trainer.precision),
            "devices": trainer.world_size,
        },
        "versions": package_versions(),
    }
