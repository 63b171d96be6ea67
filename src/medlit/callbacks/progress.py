"""A progress bar that counts to the fit's last micro-batch, not to its last optimizer step."""

from __future__ import annotations

from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Lightning's own, whose total for a fit of `max_steps` steps overlooks accumulation.

    https://github.com/Lightning-AI/pytorch-lightning/pull/21802
    """

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch, or those that are left of the fit when they are fewer."""
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return batches
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(batches, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready + left)
