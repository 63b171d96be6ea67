"""The numbers of a run: `<verb>_metrics.json`, the confusion matrix as a picture, settings beside results."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from medlit.callbacks.confusion import confusion_figure
from medlit.callbacks.folder import run_folder, verb_of
from medlit.evaluation.summary import doubt
from medlit.model.metrics import Scores
from medlit.model.module import SpecialtyClassifier
from medlit.runs import whole_file


class RunReport(L.Callback):
    """Writes a verb's metrics and confusion matrix, and shows both in TensorBoard.

    During `fit` every validation replaces `fit_metrics.json` and `confusion_fit.png`, so they end as the last one's.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the settings in TensorBoard's table of hyperparameters."""
        if trainer.logger is not None and isinstance(pl_module, SpecialtyClassifier):
            trainer.logger.log_hyperparams(pl_module.plain_settings())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report a validation; the sanity check is none."""
        if not trainer.sanity_checking:
            self._report(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report a test."""
        self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SpecialtyClassifier) or pl_module.scores is None or pl_module.answered is None:
            return
        verb = verb_of(trainer)
        scores = pl_module.scores
        loss = float(trainer.callback_metrics[f"{pl_module.stage}/loss"])
        metrics: dict[str, Any] = {**scores, **doubt(pl_module.answered, pl_module.temperature), "loss": loss}
        pl_module.answered.write(folder / f"{verb}_answers.parquet")
        with whole_file(folder / f"{verb}_metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        figure = confusion_figure(scores, _title(verb, scores))
        with whole_file(folder / f"confusion_{verb}.png") as path:
            figure.savefig(path, dpi=110)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"{pl_module.stage}/confusion", figure, trainer.global_step, close=True)


def _title(verb: str, scores: Scores) -> str:
    return (
        f"{verb}: accuracy {scores['accuracy']:.3f}, macro F1 {scores['f1_macro']:.3f},"
        f" {scores['invalid_rate']:.1%} not on the list, {scores['n']} notes"
    )
