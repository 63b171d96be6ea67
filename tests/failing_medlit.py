"""A program that is `medlit`, but in the second step of a fit one of its processes says so and fails.

FAILURE=rank:action python failing_medlit.py fit ...; the action is a name in `ACTIONS`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from medlit.__main__ import main
from medlit.unsloth_first import import_unsloth

import_unsloth()

from medlit.errors import UserError  # noqa: E402 - after Unsloth, as all that follows
from medlit.model.module import SpecialtyClassifier  # noqa: E402


def bug() -> None:
    raise ValueError("the bug of one")


def mistake() -> None:
    raise UserError("the mistake of one")


ACTIONS = {
    "bug": bug,
    "mistake": mistake,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGINT to all": lambda: os.killpg(0, signal.SIGINT),
}

rank, _, action = os.environ["FAILURE"].partition(":")
training_step = SpecialtyClassifier.training_step
failed: list[bool] = []


def failing_step(module: SpecialtyClassifier, *batch: Any) -> Any:  # noqa: ANN401 - as Lightning calls it
    if module.trainer.global_rank == int(rank) and module.global_step == 1 and not failed:
        failed.append(True)
        print("failed", time.time(), flush=True)
        ACTIONS[action]()
    return training_step(module, *batch)


SpecialtyClassifier.training_step = failing_step  # type: ignore[method-assign]
sys.exit(main())
