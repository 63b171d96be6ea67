"""How fast a fit goes, at no cost: host clocks and counters, and never a question to the GPU."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from medlit.data.collate import Batch
from medlit.model.memory import flops_per_token, model_dimensions
from medlit.model.families import causal_lm
from medlit.model.module import SpecialtyClassifier

TOKENS_PER_SECOND = "train/tokens_per_second"
NOTES_PER_SECOND = "train/notes_per_second"
PADDING = "train/padding"
PEAK_GIB = "train/peak_gib"
MFU = "train/mfu"


class _Step(NamedTuple):
    seconds: float
    tokens: int
    cells: int
    notes: int


class Throughput(L.Callback):
    """Tokens and notes a second of all processes, padding, peak GPU memory, share of the GPU's arithmetic (MFU).

    Rates are means over the last optimizer steps, without validations and, once there is another, without the first
    step, which compiles. Each process counts its own share, equal over some steps. The clock is the host's: a
    GPU works behind it, but never by more than the step that the next log line waits for.

    Real tokens count, padding does not. MFU (Chowdhery 2022, arXiv 2204.02311) is against the maker's figure for dense
    products, where Lightning knows the card.

    Args:
        steps: optimizer steps that a mean is taken over.
    """

    def __init__(self, steps: int = 10) -> None:
        self.rates: dict[str, float] | None = None
        self._steps: deque[_Step] = deque(maxlen=steps)
        self._clock: float | None = None
        self._done = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask what the card could do."""
        self._forget_step()
        self._steps.clear()
        self._done, self._first = trainer.global_step, True
        self._flops: float | None = None
        device = pl_module.device
        if device.type == "cuda" and isinstance(pl_module, SpecialtyClassifier) and pl_module.model is not None:
            torch.cuda.reset_peak_memory_stats(device)
            number = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float16
            could = get_available_flops(device, number)
            if could:
                self._flops = flops_per_token(model_dimensions(causal_lm(pl_module.model).config)) / could

    def _forget_step(self) -> None:
        self._clock = None
        self._tokens = self._cells = self._notes = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock; the next micro-batch starts it."""
        self._forget_step()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Start the clock, if it does not run."""
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch; after the step's last one, take the means."""
        self._tokens += sum(batch.lengths)
        self._cells += batch.input_ids.numel()
        self._notes += len(batch.lengths)
        if trainer.global_step == self._done or self._clock is None:
            return
        self._done, now = trainer.global_step, time.perf_counter()
        self._steps.append(_Step(now - self._clock, self._tokens, self._cells, self._notes))
        self._forget_step()
        self._clock = now
        self.rates = self._means(trainer, pl_module.device)
        if self._first:
            self._steps.clear()
            self._first = False
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(self.rates, step=trainer.global_step)

    def _means(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        seconds = sum(step.seconds for step in self._steps)
        tokens = sum(step.tokens for step in self._steps)
        rates = {
            TOKENS_PER_SECOND: trainer.world_size * tokens / seconds,
            NOTES_PER_SECOND: trainer.world_size * sum(step.notes for step in self._steps) / seconds,
            PADDING: 1 - tokens / sum(step.cells for step in self._steps),
        }
        if device.type == "cuda":
            rates[PEAK_GIB] = torch.cuda.max_memory_allocated(device) / 2**30
        if self._flops is not None:
            rates[MFU] = self._flops * tokens / seconds
        return rates
