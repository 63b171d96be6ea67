"""The newest weights: `checkpoints/last.ckpt`, from which a fit goes on."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from medlit.callbacks.folder import run_folder, verb_of


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after every validation of a fit, and at its end where none came last.

    `ModelCheckpoint(save_last=True)` writes it only together with a new best one, so that the last of a fit that got no
    better is missing. Comes after the other callbacks: the file holds their state too.
    """

    def __init__(self) -> None:
        self._saved_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log on from the step that a checkpoint left off at."""
        # Lightning counts a step for its loggers after the validation that follows it, so a checkpoint made in between
        # is one behind and the resumed curve would have that step twice.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write; the sanity check and the verb `validate` are no part of a fit."""
        if not trainer.sanity_checking and verb_of(trainer) == "fit":
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what no validation has seen."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self._saved_at == trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt")
