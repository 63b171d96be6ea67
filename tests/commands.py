"""Commands in separate processes; nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from medlit.cli import end_on_signals

# A program that is `medlit`, but one of whose processes fails; the variable FAILURE says which, and how.
FAILING = Path(__file__).with_name("failing_medlit.py")


def seconds_since_failure(output: str) -> float:
    """How long ago a process of that program did it; exactly one has."""
    assert output.count("failed") == 1, output
    return time.time() - float(output.partition("failed ")[2].split()[0])


def environment() -> dict[str, str]:
    """Environment of a separate command that imports the same sources."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def exit_code_of(
    work: Callable[[], object], sigint: signal.Handlers | Callable[..., object] = signal.default_int_handler
) -> int:
    """Do something in a fork that handles signals as a command does; its exit code.

    `sigint` is how the fork treats SIGINT before; what started these tests may ignore it, as a shell's `&` does.
    """
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGINT, sigint)
            end_on_signals()
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
