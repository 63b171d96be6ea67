"""The other processes of a run on several devices, when one of them fails."""

from __future__ import annotations

import signal
import time

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

PATIENCE = 10.0  # seconds in which a process that failed has told why and gone


def end_others(trainer: L.Trainer, error: BaseException) -> int:
    """End the processes that this one started, which would wait for it; Lightning (2.6.6) leaves them to themselves.

    What started this process (`srun`, `torchrun`) does so for the rest.

    Args:
        trainer: of the first process of this machine; of another, nothing is done.
        error: why this process ends.

    Returns:
        The exit code of a process that failed before this one did, and so is why this one ends, as a shell counts: 128
        + its number where a signal ended it; 0 where there is none.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or not launcher.procs:
        return 0
    codes: list[int] = []
    if isinstance(error, RuntimeError):  # a collective that lost its partner says so here
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not codes:
            codes = [code for process in launcher.procs if (code := process.poll())]
            time.sleep(0.1)
    launcher.kill(signal.SIGKILL)
    for process in launcher.procs:
        process.wait()
    code = codes[0] if codes else 0
    return code if code >= 0 else 128 - code
