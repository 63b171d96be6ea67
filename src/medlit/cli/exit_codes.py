"""How a verb ends that does not end well: what it leaves, what it says, and its exit code."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medlit.atomic_io import unwritable
from medlit.callbacks.distributed import end_others
from medlit.cli.predict_arguments import PREDICTIONS
from medlit.errors import UserError
from medlit.predictions.shards import find_shards


@contextmanager
def exit_codes() -> Iterator[None]:
    """Say in one sentence what a user did wrong, and end the process with the code that belongs to its end.

    Raises:
        SystemExit: code 2 after a user's mistake, told on standard error; 128 + its number after a signal.
    """
    try:
        yield
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except SIGTERMException as stop:  # in a fit StopOnSignal is before it
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from stop
        raise
    except OSError as error:
        # Lightning and its loggers write too.
        told = unwritable(error)
        if told is None:
            raise
        print(f"medlit: {told}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def undone_if_mistaken(trainer: L.Trainer, folder: Path) -> Iterator[None]:
    """Run a verb so that all its processes end with it, and a user's mistake leaves the run folder as it was.

    Args:
        trainer: the verb's.
        folder: its run folder, which may not be there yet.

    Raises:
        SystemExit: another process failed before this one did; with its exit code.
    """
    existed = folder.exists()
    events = set(folder.glob("events.out.tfevents.*"))
    try:
        yield
    except BaseException as error:
        failed = end_others(trainer, error)
        if trainer.is_global_zero and (isinstance(error, UserError) or (failed and failed[1] == 2)):
            _undo(folder, existed, events)
        if failed:
            print(f"medlit: {failed[0]}", file=sys.stderr)
            raise SystemExit(failed[1]) from error
        raise


def _undo(folder: Path, existed: bool, events: set[Path]) -> None:
    if existed:
        # Another verb may be running here: only the file that this process's logger made.
        for path in set(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*")) - events:
            path.unlink()
    elif not _worth_keeping(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for parent in (folder.parent, folder.parent.parent):
            with contextlib.suppress(OSError):  # it has other runs
                parent.rmdir()


def _worth_keeping(folder: Path) -> bool:
    """Whether a run folder holds weights or answers that a verb can go on with."""
    return (folder / "checkpoints").exists() or bool(find_shards(folder / PREDICTIONS))
