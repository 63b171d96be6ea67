"""Runs a script of this folder in a process of its own, which may crash or abort without taking medlit along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class ProcessFailed(Exception):
    """A script did not end well; the message is the last line that it said."""


def own_process(script: str, request: dict[str, Any]) -> str:
    """Run a script, which takes a JSON object by standard input, and wait for it.

    An exception that comes meanwhile, such as that of a SIGTERM, kills it.

    Args:
        script: its name in this folder.
        request: what it is asked; under 'bar' it gets a file descriptor too, of this process's standard error, for a
            progress bar: what it says on its own is kept, for the message.

    Returns:
        What it wrote to standard output.

    Raises:
        ProcessFailed: it ended with anything but 0.
    """
    bar = os.dup(2)
    # -P: the script's own folder holds modules called like packages.
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name(script))],
            input=json.dumps(request | {"bar": bar}),
            capture_output=True,
            text=True,
            errors="replace",
            # An abort in llama.cpp would have a debugger print the whole stack behind what it says.
            env=os.environ | {"HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"},
            pass_fds=(bar,),
        )
    finally:
        os.close(bar)
    if done.returncode != 0:
        raise ProcessFailed((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    return done.stdout
