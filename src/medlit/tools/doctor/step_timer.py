"""A clock on a fit of a few steps."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from medlit.data.collate import Batch, EvalBatch

STEPS = 2  # the first compiles


class Stopwatch(L.Callback):
    """Times loading, each optimizer step with all its micro-batches, and a validation batch, in seconds.

    Attributes:
        loading: reading the weights.
        steps: seconds of each optimizer step; of a GPU, until it has really done it.
        notes: in a step.
        tokens: in a step, without padding.
        validation: one batch.
        answered: notes in it.
    """

    def __init__(self) -> None:
        self.loading = self.validation = 0.0
        self.steps: list[float] = []
        self.notes = self.tokens = self.answered = 0
        self._began: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Weights come next."""
        self._began = time.perf_counter()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """They are there."""
        self.loading = self._read(pl_module)

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Start, at a step's first micro-batch."""
        if self._began is None:
            self._began = time.perf_counter()
            self.notes = self.tokens = 0
        self.notes += len(batch.lengths)
        self.tokens += sum(batch.lengths)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Stop, at its last."""
        if trainer.global_step > len(self.steps):
            self.steps.append(self._read(pl_module))

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start."""
        self._began = time.perf_counter()
        self.answered = len(batch.specialties)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop."""
        self.validation = self._read(pl_module)

    def _read(self, pl_module: L.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        began, self._began = self._began, None
        return 0.0 if began is None else time.perf_counter() - began
