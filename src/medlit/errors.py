"""Errors that the user can fix, failures that a run survives, and lines on standard error."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

SLOW = 3.0  # seconds of a stage after which it is reported


class UserError(Exception):
    """A mistake in a flag, a config, a table or a file.

    The text is one sentence: what is wrong, where, and how to fix it. The command line prints it without a traceback
    and exits with code 2; every other exception is a bug and keeps its traceback.
    """


class NotCachedError(UserError):
    """A base model or dataset that is not cached and cannot be downloaded."""


class WrongNumbersError(UserError):
    """A base model whose loss or log-likelihoods medlit does not reproduce."""


def tell(message: str) -> None:
    """Print a line on standard error, above a bar if there is one, in the first of several processes."""
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm  # importing it takes seconds
    from lightning.pytorch.utilities import rank_zero_only

    # `rank_zero_info` is silent: Unsloth gives the root logger a handler before Lightning looks for one.
    rank_zero_only(Tqdm.write)(f"medlit: {message}", file=sys.stderr)


def is_first_process() -> bool:
    """Whether this is the first of several processes, by their launcher's variables, before Lightning is imported."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def report_if_slow(what: str, *, has_bar: bool = False, say: Callable[[str], None] = tell) -> Iterator[None]:
    """Report a stage in a line once it has taken some seconds; `has_bar`: in a log only, since a terminal has a bar."""
    timer = Timer(SLOW, say, [what])
    timer.daemon = True
    if not (has_bar and sys.stderr.isatty()):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


WARNED: set[str] = set()


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Guard what a run can do without, such as figures or logs: a failure becomes one warning per process."""
    try:
        yield
    except Exception as error:
        if what not in WARNED:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
            warnings.warn(f"medlit continues without {what}: {error} ({place})", stacklevel=3)
            WARNED.add(what)
