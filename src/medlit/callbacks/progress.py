"""A progress bar that counts to the fit's last micro-batch, not to its last optimizer step."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from medlit.callbacks.throughput import TOKENS_PER_SECOND, Throughput


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

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is logged, and the tokens a second."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the last four characters of the run folder's name
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback.rates is not None and trainer.training:
                metrics["tokens/s"] = round(callback.rates[TOKENS_PER_SECOND])
        return metrics
