"""Stop a fit or a predict on a signal, with its state written: Ctrl-C, `kill`, or a scheduler that needs the node."""

import contextlib
import shlex
import signal
from types import FrameType
from typing import Any

import lightning as L

from medlit.callbacks.last_checkpoint import LastCheckpoint
from medlit.callbacks.run_files import run_folder
from medlit.data.collate import Batch
from medlit.errors import tell

# `sbatch --signal` and other schedulers send SIGUSR1 or SIGUSR2 some time before they kill.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopOnSignal(L.Callback):
    """Ends a fit at the next optimizer step after a signal, with `last.ckpt` written and exit code 128 + its number.

    Before the first step there is nothing to keep, and SIGTERM and Ctrl-C end it at once: sent to a whole process group
    they also end the processes that compile kernels, and PyTorch (2.13) waits for these forever. During a validation it
    ends at once: `last.ckpt` was written before, and a resumed fit starts with that validation. A predict ends after
    the batch; whatever else runs has nothing to keep and ends at once. With several processes the signal may reach any
    or all of them (a terminal's Ctrl-C reaches all); they agree to stop after the same step, and none forwards it. A
    second signal has its usual effect, without waiting.

    Lightning's own handlers (2.6.6) stop without writing, wait for the other processes inside the handler, and exit
    with code 0 or 1.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self.received = 0
        self.has_progress = False  # a step or an answer to keep
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers over Lightning's, which restores the previous ones after the run."""
        if not self.received:
            self._install(dict.fromkeys(SIGNALS, self._receive))

    on_sanity_check_start = on_test_start = on_train_start

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two batches, whose answers are kept."""
        self.has_progress = True
        self.on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, *_: object) -> None:
        """Note that there is a step to keep."""
        self.has_progress = True

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Stop after the batch's answers are added."""
        if self.received:
            raise SystemExit(128 + self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._install(self._before)
        end = self._before[signal.Signals(number)]
        if not self.has_progress and callable(end) and end is not signal.default_int_handler:  # which Lightning catches
            end(number, frame)

    @staticmethod
    def _install(handlers: dict[Any, Any]) -> None:
        with contextlib.suppress(ValueError):  # only the main thread can
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Stop between two optimizer steps, once the first of them is logged."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_received(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_received(trainer)
        elif trainer.state.fn == "validate":
            self.on_train_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Stop between two batches; several processes finish the validation, since their batch counts may differ."""
        if self.received and trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            self._stop(trainer)

    def _stop_if_received(self, trainer: L.Trainer) -> None:
        # One small exchange between processes per optimizer step: all must stop at the same one.
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            self.last.save(trainer)
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        run = shlex.quote(str(run_folder(trainer)))  # every process asks for it
        if not trainer.is_global_zero:
            raise SystemExit(0)  # after a failure Lightning would kill the first process before its message
        number = self.received or signal.SIGTERM
        resume = f"medlit fit --config {run}/config_fit.yaml --run_dir {run} --ckpt_path last"
        written = "" if trainer.fast_dev_run else f"; last.ckpt is written, and this continues: {resume}"  # type: ignore[attr-defined]
        tell(f"{signal.Signals(number).name} after step {trainer.global_step}{written}")
        raise SystemExit(128 + number)
