"""medlit's part of the training benchmark: its module and data module under Lightning, with a timer.

Imported after Unsloth, since it imports Lightning.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._dynamo.utils
from lightning.pytorch.loggers import TensorBoardLogger

from medlit.callbacks.nonfinite import NonfiniteGuard
from medlit.callbacks.throughput import Throughput
from medlit.cli.arguments import TRAINER_DEFAULTS
from medlit.data.collate import Batch
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.samplers import micro_batches_per_step
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import LanguageModel


class Resident(SpecialtyClassifier):
    """Stays on the GPU between fits; Lightning moves a module to the CPU when a fit ends."""

    def cpu(self) -> Resident:
        """Nothing."""
        return self


class StepClock(L.Callback):
    """Records seconds, cells, supervised tokens, compiled graphs and layers kept of each step, and estimated memory.

    The only one here that waits for the GPU, once a step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cells: list[int] = []
        self.kept: list[int] = []
        self.graphs: list[int] = []
        self.supervised: list[int] = []
        self.packs = False
        self.estimate = 0
        self.peak = self.reserved = 0
        self.ready = 0.0

    def now(self) -> float:
        """Seconds, once the GPU has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the weights are loaded."""
        self._loaded = self.now()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the first step begins, loading of its data included."""
        self._last, self._count = self.now(), 0
        self.lora_parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if (choice := pl_module.recomputation) is not None:
            prepare = choice.prepare  # its tokens are those computed, a common beginning once

            def estimated(tokens: int) -> int:
                kept: int = prepare(tokens)
                self.estimate = max(self.estimate, choice.footprint.peak(tokens, kept + choice.at_work))
                self.kept.append(kept)
                return kept

            choice.prepare = estimated

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch, and the step that it ends."""
        cells = batch.input_ids.numel()
        self._count += cells
        self.packs = batch.parts > 0
        if trainer.global_step > len(self.seconds):
            now = self.now()
            self.ready = self.ready or now - self._loaded
            self.seconds.append(now - self._last)
            self.cells.append(self._count)
            self.supervised.append(batch.step_tokens)
            self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            self._last, self._count = now, 0


class Lab:
    """One model for all of medlit's rows: loaded and compiled once; each fit continues from the last adapter."""

    def __init__(self, llama: Path, scratch: Path, cuda: bool, fp8: bool) -> None:
        settings = LanguageModel(str(llama), max_length=2048 if cuda else 512, load_in_4bit=not fp8, load_in_fp8=fp8)
        self.module = Resident(settings)
        self.scratch, self.cuda = scratch, cuda

    def fit(self, data: TranscriptionDataModule, steps: int, gib: int) -> StepClock:
        """Train for some optimizer steps within a memory budget in GiB."""
        self.module.language_model = dataclasses.replace(self.module.language_model, memory_budget_gib=gib)
        clock = StepClock()
        settings: dict[str, Any] = TRAINER_DEFAULTS | {
            "default_root_dir": str(self.scratch),
            "accelerator": "gpu" if self.cuda else "cpu",
            "devices": 1,
            "precision": "bf16-mixed" if self.cuda else "32-true",
            "max_steps": steps,
            "accumulate_grad_batches": micro_batches_per_step(data.batching, 1),
            "limit_val_batches": 0,
            "logger": TensorBoardLogger(str(self.scratch / "logs")),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [NonfiniteGuard("stop"), Throughput(), clock],
        }
        L.Trainer(**settings).fit(self.module, data)
        self.module.zero_grad(set_to_none=True)
        if self.cuda:
            clock.peak, clock.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return clock
