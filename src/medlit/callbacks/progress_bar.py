"""A progress bar that counts all micro-batches of a fit, and notes wherever notes are answered."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

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

    def init_validation_tqdm(self) -> Tqdm:
        """A bar of notes."""
        return _of_notes(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Tqdm:
        """A bar of notes."""
        return _of_notes(super().init_test_tqdm())

    def init_predict_tqdm(self) -> Tqdm:
        """A bar of notes."""
        return _of_notes(super().init_predict_tqdm())

    @property
    def total_val_batches_current_dataloader(self) -> int:
        """Notes of a validation."""
        return self._notes(self.trainer.val_dataloaders, super().total_val_batches_current_dataloader)

    @property
    def total_test_batches_current_dataloader(self) -> int:
        """Notes of a test."""
        return self._notes(self.trainer.test_dataloaders, super().total_test_batches_current_dataloader)

    @property
    def total_predict_batches_current_dataloader(self) -> int:
        """Notes to predict."""
        return self._notes(self.trainer.predict_dataloaders, super().total_predict_batches_current_dataloader)

    def _notes(self, loader: Any, batches: float) -> int:  # noqa: ANN401 - Lightning's type covers any loaders
        return sum(map(len, loader.sampler.batches[: int(batches)])) * self.trainer.world_size

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: EvalBatch | Prompts,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's notes."""
        bar: Any  # tqdm's stubs leave n and total open
        if trainer.predicting:
            bar = self.predict_progress_bar
        else:
            bar = self.test_progress_bar if trainer.testing else self.val_progress_bar
        prompts = batch if isinstance(batch, Prompts) else batch.prompts
        bar.update(min(len(prompts.rows) * self.trainer.world_size, bar.total - bar.n))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end


def _of_notes(bar: Tqdm) -> Tqdm:
    bar.unit = " notes"
    return bar
