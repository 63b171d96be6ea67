"""The end of a fit: its newest state, `checkpoints/last.ckpt`, from which it resumes, and its last validation."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, Timer

from medlit.atomic_io import remove_partial
from medlit.callbacks.run_files import run_folder
from medlit.errors import UserError, tell
from medlit.model.checkpoints import last_step, repair_progress


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` before and after every validation of a fit, and at its end.

    Before, since a fit is most likely to fail while it answers hundreds of notes; after, to include the callbacks'
    scores. `ModelCheckpoint(save_last=True)` writes it only together with a new best checkpoint, so a fit that stops
    improving never writes its last state. Comes after the other callbacks, whose state the file holds.
    """

    _saved_at = -1  # optimizer step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove partial files of a process that was killed while writing."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            for written in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "adapter"):
                remove_partial(folder / written)

    # Lightning (2.6.6) counts a step for its loggers after the validation that follows it, and restores that count
    # wrongly in three of four cases: a resumed curve would repeat a step or miss one.

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Log a step under its own number."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, but not in the sanity check or in `validate`; at its end again, with the scores."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            trainer.fit_loop.epoch_loop._batches_that_stepped = max(trainer.global_step - 1, 0)
            self.save(trainer)

    on_validation_end = on_validation_start

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
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt", weights_only=False)
        self._saved_at = trainer.global_step


class ValidateLastStep(L.Callback):
    """Stops the fit after its last optimizer step, so that Lightning validates there, and repairs resumed progress.

    Lightning validates every so many batches, or when `should_stop` is set; a fit that merely runs out of steps ends
    without a validation unless the interval divides them. For the same reason a fit that was interrupted in its last
    validation needs help to resume: Lightning sees no step left to do.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the last step and what sets it, and the length of a pass if validations are one pass apart."""
        self._room: int | None = None  # `max_steps` for a fit that has only its last validation left
        if trainer.state.fn == "fit":
            self.steps_per_epoch: int = trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
            self.last = last_step(trainer.max_steps, trainer.max_epochs, self.steps_per_epoch)
            self.limit = "trainer.max_steps" if self.last == trainer.max_steps else "trainer.max_epochs"
            if isinstance(trainer.val_check_interval, float):  # Lightning's default, a share of an epoch
                trainer.val_check_interval = self.steps_per_epoch * trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Repair the checkpoint's progress, and let a fit resume that has only its last validation left."""
        if trainer.state.fn != "fit":
            return
        micro_batches = trainer.accumulate_grad_batches
        validate_every = max(1, int(trainer.val_check_interval or 0) // micro_batches)
        is_due = repair_progress(checkpoint, self.steps_per_epoch, micro_batches, validate_every, self.last)
        step = int(checkpoint["global_step"])
        if step < self.last:
            return
        if not is_due:
            raise UserError(
                f"{self.limit}: the checkpoint has been trained for {step} steps and the fit ends after"
                f" {self.last}; raise it to continue, or run 'medlit validate'."
            )
        self._room = step + 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let Lightning run a last validation alone; by now the schedule is made, which ends at the last step."""
        if self._room is not None and trainer.max_steps != -1:
            trainer.fit_loop.epoch_loop.max_steps = self._room

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the size of the fit; validate at once if no step is left."""
        data, is_trial = trainer.datamodule, trainer.fast_dev_run  # type: ignore[attr-defined]
        if not is_trial:
            is_part = sum(trainer.num_val_batches) < len(trainer.val_dataloaders or ())
            part = " (trainer.limit_val_batches: on a part of them)" * is_part
            notes = f"{len(data.rows('train')):,} notes, validating on {len(data.rows('validation')):,}{part}"
            steps = f"{self.last:,} steps, " * (self.last < sys.maxsize) + f"{self.steps_per_epoch:,} steps per epoch"
            tell(f"training on {notes}: {steps}")
        if trainer.global_step >= self.last:
            trainer.val_check_batch = 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Stop after the last step, and after a last validation that no step precedes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step >= self.last:
            trainer.should_stop = True

    on_train_batch_end = on_validation_end  # type: ignore[assignment]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report what ended the fit, unless that was its only limit, `max_steps`."""
        step, is_trial = trainer.global_step, trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_trial or (step >= self.last and trainer.max_epochs == -1):
            return
        late = any(isinstance(each, Timer) and (each.time_remaining() or 0) <= 0 for each in trainer.callbacks)  # type: ignore[attr-defined]
        end = self.limit if step >= self.last else "trainer.max_time" if late else "early stopping"
        tell(f"{end} ended the fit after step {step}, or {step / self.steps_per_epoch:.2f} epochs")
