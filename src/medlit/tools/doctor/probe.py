"""The doctor's child process, `python -m medlit.tools.doctor.probe`: what only a run can show.

A broken CUDA library ends the process that loads it, and Unsloth must be imported in the order of a fit. Each finding
is one line of JSON on standard output, written at once, so that a crash loses none of the earlier ones:

    {"torch": {"version": "2.13.0+cpu", "cuda": null, "gpus": []}}
    {"bitsandbytes": {"version": "0.50.2"}}
    {"4-bit": {"device": "cpu"}}
    {"unsloth": {"error": "ImportError: ..."}}

With a config among the arguments the findings of `dry_run.py` follow: `{"result": {...}}`, `{"example": [...]}`, or
`{"mistake": "..."}` if the settings are invalid.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from medlit.errors import UserError

Fact = dict[str, Any]


def main(args: list[str] | None = None) -> None:
    """Print the findings; what the libraries print goes to standard error."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--show_notes", action="store_true")
    options, settings = parser.parse_known_args(args)
    stdout, sys.stdout = sys.stdout, sys.stderr

    def emit(finding: dict[str, Any]) -> None:
        print(json.dumps(finding), file=stdout, flush=True)

    facts = {}
    for name, probe in PROBES.items():
        facts[name] = _attempt(probe)
        emit({name: facts[name]})
    if not settings or any("error" in fact for fact in facts.values()):
        return

    from medlit.tools.doctor.checks import CheckResult
    from medlit.tools.doctor.dry_run import dry_run

    try:
        for finding in dry_run(settings, options.show_notes):
            emit({"result": asdict(finding)} if isinstance(finding, CheckResult) else {"example": finding})
    except UserError as error:
        emit({"mistake": str(error)})


def _attempt(probe: Callable[[], Fact]) -> Fact:
    try:
        return probe()
    except Exception as error:  # an import may raise anything, and that is the finding
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _torch() -> Fact:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        free, total = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info(index))
        # Native bf16 came with Ampere (8.0); PyTorch's own check counts emulation too.
        gpus.append({"name": device.name, "gib": total, "free": free, "bf16": device.major >= 8})
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def _bitsandbytes() -> Fact:
    return {"version": importlib.import_module("bitsandbytes").__version__}


def _four_bit() -> Fact:
    """One step through an NF4 layer with 8-bit AdamW, as a fit takes it.

    Raises:
        ArithmeticError: a result is no number, or the optimizer does not keep its state in 8 bits.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.optim import AdamW8bit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    x = torch.nn.Parameter(torch.ones(32, 128, device=device))  # of fewer than 4,096 numbers the state has 32 bits
    optimizer = AdamW8bit([x], lr=1e-2, weight_decay=0.0)
    layer(x).sum().backward()
    optimizer.step()
    if not x.isfinite().all() or x.eq(1).all():
        raise ArithmeticError("a step through a 4-bit layer gives wrong numbers")
    if not any(getattr(state, "dtype", None) == torch.uint8 for state in optimizer.state[x].values()):
        raise ArithmeticError("8-bit AdamW does not keep its state in 8 bits")
    return {"device": device.type}


def _unsloth() -> Fact:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    return {"version": sys.modules["unsloth"].__version__}


PROBES = {"torch": _torch, "bitsandbytes": _bitsandbytes, "4-bit": _four_bit, "unsloth": _unsloth}

if __name__ == "__main__":
    main()
