"""What only running it can tell: `python -m medlit.tools.doctor.probe`, by the doctor, in a process of its own.

A broken CUDA library ends the process that loads it, and Unsloth must be imported as the verbs import it; so the
doctor asks a child, and one child for everything, since importing is what takes the time. Each finding is one line of
JSON on standard output, written at once, so that what was found before a crash still arrives:

    {"torch": {"version": "2.13.0+cpu", "cuda": null, "gpus": []}}
    {"bitsandbytes": {"version": "0.50.2"}}
    {"4-bit": {"forward": 0.09, "backward": 0.08}}
    {"unsloth": {"error": "ImportError: ..."}}

With a config among the arguments, what `trial.py` finds of it follows: `{"row": {...}}`, `{"example": [...]}`, or
`{"mistake": "..."}` where the settings themselves are none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Facts = dict[str, Any]


def main(args: list[str] | None = None) -> None:
    """Print the findings; whatever the libraries print themselves goes to standard error."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--show_notes", action="store_true")
    options, settings = parser.parse_known_args(args)
    answers, sys.stdout = sys.stdout, sys.stderr

    def tell(finding: Facts) -> None:
        print(json.dumps(finding), file=answers, flush=True)

    imported = True
    for name, probe in {
        "torch": _torch,
        "bitsandbytes": _bitsandbytes,
        "4-bit": _four_bit,
        "8-bit AdamW": _optimizer,
        "triton": _triton,
        "unsloth": _unsloth,
    }.items():
        found = _attempt(probe)
        imported = imported and (name == "triton" or "error" not in found)
        tell({name: found})
    if settings and imported:
        _try(settings, options.show_notes, tell)


def _try(settings: list[str], show_notes: bool, tell: Callable[[Facts], None]) -> None:
    from medlit.errors import UserError
    from medlit.tools.doctor.check_result import Row
    from medlit.tools.doctor.dry_run import rehearse

    try:
        for finding in rehearse(settings, show_notes):
            tell({"row": asdict(finding)} if isinstance(finding, Row) else {"example": finding})
    except UserError as error:
        tell({"mistake": str(error)})


def _attempt(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:  # an import may raise anything, and what it raised is the finding
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text}"}


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _torch() -> Facts:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        # Emulated bf16 answers yes everywhere; native support came with Ampere, compute capability 8.0.
        gpus.append(
            {
                "name": found.name,
                "gib": round(total / 2**30, 1),
                "free": round(free / 2**30, 1),
                "bf16": found.major >= 8,
            }
        )
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def _bitsandbytes() -> Facts:
    return {"version": importlib.import_module("bitsandbytes").__version__}


def _four_bit() -> Facts:
    from medlit.tools.doctor.quantised import four_bit

    return {"device": str(_device()), **four_bit(_device())}


def _optimizer() -> Facts:
    from medlit.tools.doctor.quantised import optimizer_step

    return {"device": str(_device()), **optimizer_step(_device())}


def _triton() -> Facts:
    if _device().type != "cuda":
        return {"version": None}
    from medlit.tools.doctor.kernel import doubles

    if not doubles():
        raise ArithmeticError("a compiled kernel gave a wrong result")
    return {"version": importlib.import_module("triton").__version__}


def _unsloth() -> Facts:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    return {"version": sys.modules["unsloth"].__version__}


if __name__ == "__main__":
    main()
