"""What only an import can tell: run as `python -m medlit.tools.doctor.probe` by the doctor, in a process of its own.

A broken CUDA library ends the process that loads it, and Unsloth must be imported as the verbs import it; so the
doctor asks a child. Each finding is one line of JSON on standard output, written at once, so that what was found before
a crash still arrives:

    {"torch": {"version": "2.13.0+cpu", "cuda": null, "gpus": []}}
    {"bitsandbytes": {"version": "0.50.2"}}
    {"unsloth": {"error": "ImportError: ..."}}
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]


def main() -> None:
    """Print the findings; whatever the libraries print themselves goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for name, probe in {"torch": _torch, "bitsandbytes": _bitsandbytes, "unsloth": _unsloth}.items():
        print(json.dumps({name: _attempt(probe)}), file=answers, flush=True)


def _attempt(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:  # an import may raise anything, and what it raised is the finding
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text}"}


def _torch() -> Facts:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        # Emulated bf16 answers yes everywhere; native support came with Ampere, compute capability 8.0.
        gpus.append({"name": found.name, "gib": round(found.total_memory / 2**30, 1), "bf16": found.major >= 8})
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def _bitsandbytes() -> Facts:
    return {"version": importlib.import_module("bitsandbytes").__version__}


def _unsloth() -> Facts:
    from medlit.__main__ import import_unsloth

    import_unsloth()
    return {"version": sys.modules["unsloth"].__version__}


if __name__ == "__main__":
    main()
