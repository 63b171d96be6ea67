"""The newest state of a fit, `checkpoints/last.ckpt`, from which it resumes."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from medlit.atomic_io import remove_partial
from medlit.callbacks.run_files import run_folder, subcommand_of


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` before and after every validation of a fit, and at its end.

    Before, since a fit is most likely to fail while it answers hundreds of notes; after, to include the callbacks'
    scores. `ModelCheckpoint(save_last=True)` writes it only together with a new best checkpoint, so a fit that stops
    improving never writes its last state. Comes after the other callbacks, whose state the file holds.
    """

    def __init__(self) -> None:
        self._saved_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove partial files of a process that was killed while writing."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            for path in (self._path(folder), folder / "checkpoints" / "best.ckpt", folder / "adapter"):
                remove_partial(path)

    # Lightning (2.6.6) counts a step for its loggers after the validation that follows it, and restores that count
    # wrongly in three of four cases: a resumed curve would repeat a step or miss one.

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Log a step under its own number."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, but not in the sanity check or in `validate`."""
        if not trainer.sanity_checking and subcommand_of(trainer) == "fit":
            trainer.fit_loop.epoch_loop._batches_that_stepped = max(trainer.global_step - 1, 0)
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write again, with the scores."""
        if not trainer.sanity_checking and subcommand_of(trainer) == "fit":
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, unless the fit ended with a validation."""
        if self._saved_at != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state after this optimizer step; every process must call this."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()  # a resumed fit does not log these steps again
        trainer.save_checkpoint(self._path(run_folder(trainer)), weights_only=False)
        self._saved_at = trainer.global_step

    @staticmethod
    def _path(folder: Path) -> Path:
        return folder / "checkpoints" / "last.ckpt"
