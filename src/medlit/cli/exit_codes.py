"""Clean-up after a failure: other processes end, and a user's mistake leaves no run folder behind."""

import atexit
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from medlit.cli.arguments import PREDICTIONS
from medlit.errors import UserError
from medlit.predictions.shards import find_shards


@contextmanager
def clean_up_on_failure(trainer: L.Trainer, folder: Path, existed: bool = True) -> Iterator[None]:
    """Run a verb; a failure ends its other processes, and a user's mistake leaves the run folder as it was."""
    events = set(folder.glob("events.out.tfevents.*"))
    try:
        yield
    except BaseException as error:
        _end_other_processes(trainer)
        if trainer.is_global_zero and isinstance(error, UserError):
            # Another verb may be writing to a folder that existed: remove only what this process's logger made.
            for path in set(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*")) - events if existed else ():
                path.unlink()
            if not (existed or (folder / "checkpoints").exists() or find_shards(folder / PREDICTIONS)):
                shutil.rmtree(folder, ignore_errors=True)  # there is nothing to resume from
        raise
    finally:
        for path in () if existed else (folder, folder.parent, folder.parent.parent):
            with suppress(OSError):  # there is something in it
                path.rmdir()


def _end_other_processes(trainer: L.Trainer) -> None:
    """End the processes that this one has started; after a failure of this one they would wait for it.

    Lightning (2.6.6) kills all processes when one that it has started fails, but not when the first one does. `srun`
    and `torchrun` do so themselves, once this process has ended.
    """
    # With NCCL, Lightning's destruction of the process group at exit waits for all processes, so this one would hang.
    atexit.unregister(_destroy_dist_connection)
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)
