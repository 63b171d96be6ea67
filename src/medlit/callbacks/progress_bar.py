"""A progress bar that counts notes where notes are answered, and so tells notes/s."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from medlit.callbacks.progress import StepProgressBar
from medlit.data.collate import EvalBatch, Prompts

_UNIT = " notes"


class NotesProgressBar(StepProgressBar):
    """Lightning's own, with notes in the place of batches in validate, test and predict.

    It counts this process's notes times the number of processes, to which they are dealt alike, to within one. The
    longest come first, so the rate rises and less time is left than the bar tells.
    """

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
        """Notes to file."""
        return self._notes(self.trainer.predict_dataloaders, super().total_predict_batches_current_dataloader)

    def _notes(self, loader: Any, batches: float) -> int:  # noqa: ANN401 - whatever loaders there may be; a DataLoader
        return sum(map(len, loader.sampler.batches[: int(batches)])) * self.trainer.world_size

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's notes."""
        self._advance(self.val_progress_bar, batch.prompts)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's notes."""
        self._advance(self.test_progress_bar, batch.prompts)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Prompts,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's notes."""
        self._advance(self.predict_progress_bar, batch)

    def _advance(self, bar: Any, prompts: Prompts) -> None:  # noqa: ANN401 - tqdm's stubs leave n and total open
        bar.update(min(len(prompts.rows) * self.trainer.world_size, bar.total - bar.n))


def _of_notes(bar: Tqdm) -> Tqdm:
    bar.unit = _UNIT
    return bar
