"""A fit that is asked to stop writes its state first: Ctrl-C, `kill`, and a scheduler that wants its machine back."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from medlit.callbacks.last_checkpoint import LastCheckpoint
from medlit.callbacks.run_folder import run_folder, verb_of

# SIGUSR1 and SIGUSR2 are what `sbatch --signal` and other schedulers send some time before they kill.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopOnSignal(L.Callback):
    """Ends a fit at the next optimizer step after a signal, with `last.ckpt` written and exit code 128 + its number.

    In a validation it ends at once: its step's `last.ckpt` was written before it began, and a fit that goes on begins
    with that validation. Of several processes any may get the signal, or all of them, as a terminal's Ctrl-C goes to
    all; they stop after the same step. So none hands it on: that would be the others' second one. A second signal is
    not waited for: it does what it would have done without medlit.

    Lightning's own handlers (2.6.6) stop without writing, wait for the other processes inside the handler, and exit
    with code 0 or 1.

    Args:
        last: writes the file.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self.received = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, in place of Lightning, which begins just before."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; Lightning puts the earlier handlers back when the fit is over."""
        if self.received:
            return
        try:
            for number in SIGNALS:
                signal.signal(number, self._receive)
        except ValueError:
            return  # only a program's main thread can

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Stop between two optimizer steps, when the first of them has been logged."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation."""
        if verb_of(trainer) == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop between two answers; several processes, of which one may have fewer batches, finish the validation."""
        if self.received and trainer.world_size == 1 and verb_of(trainer) == "fit" and not trainer.sanity_checking:
            self._stop(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = bool(self.received)
        if trainer.world_size > 1:  # one small exchange an optimizer step: all must stop at the same one
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.last.save(trainer)
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            # One process that fails makes Lightning kill the others, the first one before it has said why it ends.
            raise SystemExit(0)
        number = self.received or signal.SIGTERM
        kept = f"; last.ckpt is written, and this goes on: {going_on(folder)}"
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            kept = ""
        name = signal.Signals(number).name
        print(f"medlit: {name} after step {trainer.global_step}{kept}", file=sys.stderr)
        raise SystemExit(128 + number)


def going_on(folder: Path) -> str:
    """The whole command that goes on with the fit of a run folder, whatever it was started by."""
    return shlex.join(
        ["medlit", "fit", "--config", f"{folder / 'config_fit.yaml'}", "--run_dir", f"{folder}", "--ckpt_path", "last"]
    )
