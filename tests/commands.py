"""Commands of their own that are `medlit` with one of its processes made to fail; nothing heavy is imported here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from medlit.cli import end_on_signals

RUNNER = """
import os, signal, time
from medlit.__main__ import main
from medlit.unsloth_first import import_unsloth
import_unsloth()
from medlit.errors import UserError
from medlit.model.module import SpecialtyClassifier as Module
step, done = Module.training_step, []
def training_step(self, batch, batch_idx):
    if self.trainer.global_rank == {rank} and self.global_step == 1 and not done:
        done.append(True)
        print('failed', time.time(), flush=True)
        {does}
    return step(self, batch, batch_idx)
Module.training_step = training_step
main()
"""


def write_runner(path: Path, rank: int, does: str) -> Path:
    """A program that is `medlit`, but in the second step one of its processes says so and does something."""
    path.write_text(RUNNER.format(rank=rank, does=does))
    return path


def seconds_since_failure(output: str) -> float:
    """How long ago a process of that program did it; exactly one has."""
    assert output.count("failed") == 1, output
    return time.time() - float(output.partition("failed ")[2].split()[0])


def environment() -> dict[str, str]:
    """Environment of a separate command that imports the same sources."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def exit_code_of(work: Callable[[], object]) -> int:
    """Do something in a fork that handles signals as a command does; its exit code."""
    child = os.fork()
    if not child:
        try:
            end_on_signals()
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
