"""The other processes of a run on several devices: what happens to all when one of them fails."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _destroy_dist_connection, _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import DistError

from medlit.errors import UserError

PATIENCE = 10.0  # seconds in which a process that failed has told why and gone
# How gloo and NCCL say that another process has gone.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "gloo", "NCCL", "Socket")


class Launcher(_SubprocessScriptLauncher):
    """Lightning's own way to start the other processes of this machine, with an observer that tells.

    Lightning's (2.6.6) looks every five seconds, and where one has failed it kills all with SIGKILL: the command ends
    with code 137, whatever the reason, and without a word where the reason was a signal.
    """

    observer: Observer | None = None

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """Start the others, then do what is to be done.

        Raises:
            UserError: what started this process started another number of them than the config wants.
        """
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UserError(f"trainer.devices, trainer.num_nodes: {error}") from error
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            self.observer = Observer(self.procs)
            self.observer.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class Observer(_ChildProcessObserver):
    """Ends this process, and the others, some seconds after one of them has failed.

    Only if this one has not ended by itself meanwhile: a collective that loses its partner fails on a CPU, and on a GPU
    may wait for half an hour.

    Args:
        processes: the others, from rank 1 on.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(os.getpid(), processes, sleep_period=1)
        self.stand_down = threading.Event()

    def _terminate_all(self) -> None:
        if self.stand_down.wait(PATIENCE):
            return
        told, code = what_ended(self._child_processes)
        print(f"medlit: {told}", file=sys.stderr, flush=True)
        _kill(self._child_processes)
        os._exit(code)


def watch_others(trainer: L.Trainer) -> None:
    """Let a run that starts processes of its own, and only such a one, start them with medlit's launcher."""
    theirs = trainer.strategy.launcher
    if type(theirs) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)


def end_others(trainer: L.Trainer, error: BaseException) -> tuple[str, int] | None:
    """End the processes that this one started, which would wait for it; Lightning (2.6.6) leaves them to themselves.

    What started this process (`srun`, `torchrun`) does so for the rest, as soon as it has ended: without taking leave.

    Args:
        trainer: of the first process of this machine, which alone has started others.
        error: why this process ends.

    Returns:
        Of a process that failed before this one did, and so is why this one ends: what to say of it, and its exit code.
    """
    # At the end of a process Lightning takes leave of the others, which with NCCL all have to do at the same time: one
    # that fails would hang, and whoever watches it (`srun`, `torchrun`, the observer) would not see that it has ended.
    atexit.unregister(_destroy_dist_connection)
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, Launcher) or not launcher.procs:
        return None
    if launcher.observer is not None:
        launcher.observer.stand_down.set()
    failed: tuple[str, int] | None = None
    if lost_a_partner(error):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not any(process.poll() for process in launcher.procs):
            time.sleep(0.1)
        if any(process.poll() for process in launcher.procs):
            failed = what_ended(launcher.procs)
    _kill(launcher.procs)
    return failed


def lost_a_partner(error: BaseException) -> bool:
    """Whether an error is what a process meets when another one has gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _LOST))


def what_ended(processes: list[subprocess.Popen[bytes]]) -> tuple[str, int]:
    """What to say of the process that failed, and its exit code as a shell counts: 128 + its number after a signal.

    Of several a signal counts first, and a user's mistake before code 1: with that ends, too, who lost a partner.
    """
    codes = {rank: process.returncode for rank, process in enumerate(processes, start=1) if process.returncode}
    rank = min(codes, key=lambda rank: (codes[rank] > 0, codes[rank] == 1, rank))
    if codes[rank] > 0:
        return f"process {rank} of this run failed; what it said stands above.", codes[rank]
    name = signal.Signals(-codes[rank]).name
    told = f"process {rank} of this run was ended by {name} from outside"
    if codes[rank] == -signal.SIGKILL:
        told += ", as a machine does whose memory is full; fewer trainer.devices or data.batching.num_workers take less"
    return f"{told}.", 128 - codes[rank]


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
