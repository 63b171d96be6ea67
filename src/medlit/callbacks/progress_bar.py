"""A progress bar that counts all micro-batches of a fit, and notes wherever notes are answered."""

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from medlit.callbacks.throughput import TOKENS_PER_SECOND, Throughput
from medlit.data.collate import EvalBatch, Prompts


class ProgressBar(TQDMProgressBar):
    """Lightning's own, with notes in place of batches in validate, test and predict, and so notes/s.

    It shows this process's notes times the number of processes, which have the same number to within one. The longest
    notes come first, so the rate rises and the remaining time is overestimated.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch, or those that are left of the fit when they are fewer.

        Lightning's total for a fit of `max_steps` ignores gradient accumulation:
        https://github.com/Lightning-AI/pytorch-lightning/pull/21802
        """
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return batches
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(batches, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready + left)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The logged metrics and the tokens a second."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the last four characters of the run folder's name
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback.rates is not None and trainer.training:
                metrics["tokens/s"] = round(callback.rates[TOKENS_PER_SECOND])
        return metrics

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Start to count notes."""
        if self.has_dataloader_changed(0):
            stage = trainer.state.stage.dataloader_prefix  # type: ignore[union-attr]
            batches = getattr(trainer, f"{stage}_dataloaders").sampler.batches
            limit = int(getattr(self, f"total_{stage}_batches_current_dataloader"))
            self._bar = getattr(self, f"{stage}_progress_bar")
            self._bar.unit = " notes"
            self._bar.reset(sum(map(len, batches[:limit])) * trainer.world_size)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: EvalBatch | Prompts, *_: int
    ) -> None:
        """Count a batch's notes."""
        prompts = batch if isinstance(batch, Prompts) else batch.prompts
        self._bar.update(min(len(prompts.rows) * trainer.world_size, self._bar.total - self._bar.n))

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start  # type: ignore[assignment]
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end  # type: ignore[assignment]
