"""Which note was in which split: `split.parquet`, with ids and texts' hashes and no text."""

from __future__ import annotations

import lightning as L

from medlit.callbacks.run_folder import run_folder, verb_of
from medlit.data.datamodule import TranscriptionDataModule


class SplitRecord(L.Callback):
    """Writes the split that a fit trains on; another verb writes it only where the run has none yet.

    It does so when the verb really begins, as `SaveConfig` does: one that fails beforehand leaves the run as it was.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, in place of what an earlier fit in this run wrote."""
        self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, unless it is a fit that validates."""
        if verb_of(trainer) == "validate":
            self._write(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        self._write(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, where a split is filed and not a table of its own."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.fast_dev_run or not isinstance(data, TranscriptionDataModule) or data.splits is None:  # type: ignore[attr-defined]
            return
        path = run_folder(trainer) / "split.parquet"
        if trainer.is_global_zero and (verb_of(trainer) == "fit" or not path.exists()):
            data.splits.write(path)
