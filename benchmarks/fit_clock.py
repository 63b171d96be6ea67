"""A callback that times the steps of `medlit fit`, one file per process.

A callback that a config names, so that Lightning's own launcher may start the processes; see `scaling.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from train_medlit import StepClock

from medlit.data.collate import Batch
from medlit.model.families import block_swap

# Reductions of gradients and other communication: NCCL's kernels, and gloo's calls.
ALL_REDUCE = ("ncclDevKernel_AllReduce", "gloo:all_reduce")
EXCHANGE = ("ncclDevKernel", "gloo:")
GRADIENT = "gradient.pt"


class FitClock(StepClock):
    """Writes `rank<r>.json`: seconds and real tokens of each step, memory, and time in exchanges.

    Args:
        folder: where to.
        profiled: last steps of the fit, in which a profiler adds up what exchanges take; the steps before are timed
            without it.
        gradient: whether the first process also leaves the first step's gradient, before it is clipped.
        limit_gib: of a GPU's memory, beyond which an allocation fails; 0: none.
    """

    def __init__(self, folder: str, profiled: int = 0, gradient: bool = False, limit_gib: float = 0) -> None:
        super().__init__()
        self.folder, self.profiled, self.gradient = Path(folder), profiled, gradient
        self.limit = int(limit_gib * 2**30)
        self.tokens: list[int] = [0]
        self.micro_batches: list[list[int]] = [[]]
        self.largest = 0
        self.profiler: profile | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Limit this process's memory before the model is loaded."""
        device = trainer.strategy.root_device
        if self.limit and device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total), device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the first gradient, already reduced over all processes."""
        if self.gradient and trainer.global_step == 0 and trainer.is_global_zero:
            found = {name: p.grad.cpu() for name, p in pl_module.named_parameters() if p.grad is not None}
            torch.save(found, self.folder / GRADIENT)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count steps, start and stop the profiler, and write the file after the last step, before validation."""
        self.tokens[-1] += sum(batch.lengths)
        self.micro_batches[-1].append(sum(batch.lengths))
        self.largest = max(self.largest, batch.input_ids.numel())
        before = len(self.seconds)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(self.seconds) == before:
            return
        if self.profiled and len(self.seconds) == trainer.max_steps - self.profiled:
            kind = ProfilerActivity.CUDA if pl_module.device.type == "cuda" else ProfilerActivity.CPU
            self.profiler = profile(activities=[kind])
            self.profiler.start()
            self._last = self.now()
        if len(self.seconds) == trainer.max_steps:
            self._write(trainer, pl_module)
        else:
            self.tokens.append(0)
            self.micro_batches.append([])

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found: dict[str, Any] = {
            "rank": trainer.global_rank,
            "weights_on": sorted({str(p.device) for p in pl_module.parameters()}),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "micro_batches": self.micro_batches,
            "largest": self.largest,
            "layers_kept": [min(self.kept), max(self.kept)] if self.kept else None,
            "estimated_bytes": self.estimate,
        }
        if (swap := block_swap(pl_module.model)) is not None:
            found |= {"offloaded_layers": len(swap.indices), "host_bytes": swap.host_bytes()}
        if pl_module.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(pl_module.device)
        if self.profiler is not None:
            self.profiler.stop()
            seconds = sum(self.seconds[-self.profiled :])
            found["all_reduce_share"] = self._spent(ALL_REDUCE) / seconds
            found["exchange_share"] = self._spent(EXCHANGE) / seconds
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))

    def _spent(self, kinds: tuple[str, ...]) -> float:
        """Seconds of the profiled steps spent in communication, waiting included."""
        assert self.profiler is not None
        events = [event for event in self.profiler.key_averages() if event.key.startswith(kinds)]
        return sum(max(event.device_time_total, event.cpu_time_total) for event in events) / 1e6
