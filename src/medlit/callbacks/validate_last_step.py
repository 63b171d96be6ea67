"""The last optimizer step is always validated, and so saved."""

from __future__ import annotations

from typing import Any

import lightning as L

from medlit.callbacks.run_folder import verb_of
from medlit.errors import UserError
from medlit.model.resume import last_step, repair_progress, validation_due


class LastStep(L.Callback):
    """Stops the fit after its last optimizer step, which makes Lightning validate there.

    Lightning validates every so many batches, or when `should_stop` is set and it may stop; a fit that merely runs out
    of steps ends without validation unless the interval happens to divide them. For the same reason a fit that was
    interrupted in its last validation has to be let in again by hand: Lightning sees no step left to do.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note where the fit ends."""
        if verb_of(trainer) == "fit":
            self.last = last_step(trainer.max_steps, trainer.max_epochs, trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a fit in that has nothing but its last validation to do.

        Raises:
            UserError: it has not even that.
        """
        if verb_of(trainer) != "fit":
            return
        steps_per_epoch = trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        micro_batches = trainer.accumulate_grad_batches
        validate_every = max(1, int(trainer.val_check_interval or 0) // micro_batches)
        repair_progress(checkpoint, steps_per_epoch, micro_batches, validate_every, self.last)
        step = int(checkpoint["global_step"])
        if step < self.last:
            return
        if not validation_due(checkpoint):
            raise UserError(
                f"trainer.max_steps: the checkpoint has been trained for {step} steps and the fit ends after"
                f" {self.last}; raise it to go on, or run 'medlit validate'."
            )
        if trainer.max_steps != -1:
            trainer.fit_loop.epoch_loop.max_steps = step + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the validation due at once where no step is left."""
        if trainer.global_step >= self.last:
            trainer.val_check_batch = 1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Recognise the last step."""
        if trainer.global_step >= self.last:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Recognise the last validation where it came without a step before it."""
        if verb_of(trainer) == "fit" and not trainer.sanity_checking and trainer.global_step >= self.last:
            trainer.should_stop = True
