"""Training throughput, from the host's clock and counters; progress bar and log."""

import time
from collections import deque
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.types import STEP_OUTPUT

from medlit.data.collate import Batch, EvalBatch, Prompts
from medlit.errors import best_effort, tell

TOKENS_PER_SECOND = "train/tokens_per_second"
NOTES_PER_SECOND = "train/notes_per_second"
PADDING = "train/padding"
LOG_SECONDS = 30  # between two lines of progress, at least


class Throughput(L.Callback):
    """Logs tokens (without padding) and notes per second of all processes, padding, peak GPU memory; shows the loss.

    Rates are means over the last optimizer steps, without validations and, from the second step on, without the first,
    which compiles. Each process counts its own micro-batches and multiplies by the number of processes. The loss of the
    progress bar is fetched at a step's end, where `NonfiniteGuard` waits for a GPU anyway, not after a micro-batch.
    """

    def __init__(self, steps: int = 10) -> None:
        self.rates: dict[str, float] | None = None
        self._steps: deque[tuple[float, ...]] = deque(maxlen=steps)  # seconds, tokens, padded tokens, notes

    @best_effort("the throughput")
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, from the step that a fit resumes at."""
        self._reset_step()
        self._steps.clear()
        self._last_step, self.rates = trainer.global_step, None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock; the next micro-batch restarts it."""
        self._reset_step()

    def _reset_step(self, started_at: float | None = None) -> None:
        self._started_at = started_at
        self._counts = np.zeros(3, dtype=np.int64)  # tokens, padded tokens, notes

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Start the clock, unless it is running."""
        if self._started_at is None:
            self._started_at = time.perf_counter()

    @best_effort("the throughput")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Count a micro-batch; after the step's last one, update and log the rates."""
        self._counts += (sum(batch.lengths), batch.input_ids.numel(), len(batch.ids))
        if trainer.global_step == self._last_step or self._started_at is None:
            return
        now = time.perf_counter()
        self._steps.append((now - self._started_at, *self._counts.tolist()))
        self._reset_step(now)
        self._last_step = trainer.global_step
        # Logged for the bar, Lightning would fetch it after each micro-batch, and the GPU would wait for the next one.
        trainer.progress_bar_metrics["train/loss"] = float(trainer.callback_metrics["train/loss"])
        is_first, self.rates = self.rates is None, self.mean_rates(trainer, pl_module.device)
        if is_first:
            self._steps.clear()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(self.rates, step=trainer.global_step - 1)  # as Lightning counts in `train/loss`

    def mean_rates(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        """The rates of the last steps."""
        seconds, tokens, padded_tokens, notes = map(sum, zip(*self._steps, strict=True))
        rates = {
            TOKENS_PER_SECOND: trainer.world_size * tokens / seconds,
            NOTES_PER_SECOND: trainer.world_size * notes / seconds,
            PADDING: 1 - tokens / padded_tokens,
        }
        if device.type == "cuda":
            rates["train/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return rates


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, whose unit is a micro-batch of the whole fit while it trains, and a note while it answers.

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

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The logged metrics and the tokens per second."""
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
            batches = getattr(trainer, f"{stage}_dataloaders").sampler
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


class ProgressLog(L.Callback):
    """Prints a line where a bar would fill a log: after LOG_SECONDS, then at tenths of the time, no closer together."""

    _start: tuple[float, int] | None = None  # the clock and the count after the first batch
    _logged_at, _tenth = 0.0, -1  # of the last line: the clock, and tenths of the time that had passed

    @best_effort("the progress in the log")
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401 - module, outputs, batch, index
        """Report a step, with the loss and the rate that a bar shows, or an evaluation's batch."""
        now, verb = time.perf_counter(), trainer.state.fn.value  # type: ignore[union-attr]
        if verb == "fit" and not trainer.training:
            return
        done = trainer.global_step if trainer.training else args[3] + 1
        self._start = self._start or (now, done)
        began, first = self._start
        if done == first or now - max(began, self._logged_at) < LOG_SECONDS:
            return
        if trainer.training:
            total = trainer.estimated_stepping_batches
        else:
            total = sum(getattr(trainer, f"num_{trainer.state.stage.dataloader_prefix}_batches"))  # type: ignore[union-attr]
        limits = [each.time_remaining() or 0 for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
        left = min([(now - began) * (total - done) / (done - first), *limits])
        if done < total and (tenth := int(10 * (now - began) / (now - began + left))) != self._tenth:
            self._logged_at, self._tenth = now, tenth
            shown = f"{verb}: batch {done:,} of {total:,}"
            if trainer.training:
                rates = next(each.rates for each in trainer.callbacks if isinstance(each, Throughput)) or {}  # type: ignore[attr-defined]
                loss = float(trainer.callback_metrics["train/loss"])
                shown = f"step {done:,}: loss {loss:.3f}, {rates[TOKENS_PER_SECOND]:,.0f} tokens/s"
            tell(f"{shown}, {Tqdm.format_interval(left)} left")

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end  # type: ignore[assignment]
