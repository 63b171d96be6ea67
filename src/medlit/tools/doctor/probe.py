"""The doctor's child process, `python -m medlit.tools.doctor.probe`: what only a run can show.

A broken CUDA library ends the process that loads it, and Unsloth must be imported in the order of a fit. Each result is
one line of JSON on standard output, a `CheckResult`, written at once, so that a crash loses none of the earlier ones.
With a config among the arguments the results of `dry_run.py` follow, or `{"mistake": "..."}` for invalid settings.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medlit.errors import UserError
from medlit.tools.doctor import REINSTALL, CheckResult, version_of


def main(args: list[str]) -> None:
    """Print the results; what the libraries print goes to standard error."""
    settings = [argument for argument in args if argument != "--show_notes"]
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            for result in _check(settings, "--show_notes" in args):
                print(json.dumps(asdict(result)), file=stdout, flush=True)
        except UserError as error:
            print(json.dumps({"mistake": str(error)}), file=stdout, flush=True)


def _check(settings: list[str], show_notes: bool) -> Iterator[CheckResult]:
    usable = True
    for name, check in LIBRARY_CHECKS.items():
        try:
            results = check()
        except Exception as error:  # an import may raise anything, and that is the finding
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            results = [CheckResult(name, "fail", found, library_remedy(name, _cuda()))]
        usable = usable and all(result.status != "fail" for result in results)
        yield from results
    if settings and usable:
        from medlit.tools.doctor.dry_run import dry_run

        yield from dry_run(settings, show_notes)


def library_remedy(name: str, cuda: str) -> str:
    """What to do about a library that does not work beside a PyTorch for this CUDA version (empty: for the CPU)."""
    if name == "torch":
        return REINSTALL
    if name == "unsloth" and not cuda and version_of("torchvision"):
        return "pip uninstall torchvision: it does not load beside a CPU build of torch, and Unsloth works without it"
    remedy = f"pip install --no-deps -r requirements/{'gpu' if cuda else 'cpu'}.txt"
    return remedy if name == "unsloth" else f"{remedy}; if the error stays, see 'python -m bitsandbytes'"


def _cuda() -> str:
    torch = sys.modules.get("torch")  # absent if its import failed, which its own check reports
    return (torch and torch.version.cuda) or ""


def _torch() -> list[CheckResult]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        free, total = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info(index))
        # Native bf16 came with Ampere (8.0); PyTorch's own check counts emulation too.
        devices.append({"name": device.name, "gib": total, "free": free, "bf16": device.major >= 8})
    cuda = _cuda()
    build = f"{torch.__version__}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}"
    return [CheckResult("torch", "ok", build), *gpus(devices, cuda), *([triton()] if devices else [])]


def gpus(devices: list[dict[str, Any]], cuda: str) -> list[CheckResult]:
    """The GPUs (name, gib, free, bf16) of a PyTorch for a CUDA version (empty: for the CPU), or why there is none."""
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    precision = {True: "bf16", False: "no bf16, so fits run in 16-mixed (as configs/hardware/t4_16gb.yaml)"}
    if devices:
        found = [f"{gpu['name']}, {gpu['free']} of {gpu['gib']} GiB free, {precision[gpu['bf16']]}" for gpu in devices]
        version = f", driver {driver}" if driver else ""  # nvidia-smi may be missing in a container
        return [CheckResult(f"GPU {i}", "ok", text + version) for i, text in enumerate(found)]
    if not driver:
        text, remedy = "none: everything runs on the CPU", "to fine-tune an 8B model: an NVIDIA GPU of 8 GB or more"
    elif cuda:
        text = f"PyTorch cannot use the GPU of this machine, whose driver is {driver}"
        remedy = f"update the NVIDIA driver to one for CUDA {cuda} (for CUDA 13: 580 or newer)"
    else:
        text, remedy = "this machine has one, but PyTorch is built for the CPU", f"{REINSTALL} BUILD=gpu"
    return [CheckResult("GPU", "warn", text, remedy)]


def triton() -> CheckResult:
    """What Triton compiles Unsloth's kernels with: a C compiler and Python's headers."""
    missing = [] if any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))) else ["C compiler"]
    missing += [] if Path(sysconfig.get_path("include"), "Python.h").is_file() else ["Python.h"]
    if missing:
        remedy = "install a C compiler and Python's headers (build-essential, python3-dev)"
        return CheckResult("Triton", "warn", f"cannot compile kernels: no {' and no '.join(missing)}", remedy)
    return CheckResult("Triton", "ok", "C compiler and Python.h found")


def command_output(*command: str) -> str:
    """Standard output of a command; empty if the command does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _bitsandbytes() -> list[CheckResult]:
    """One step through an NF4 layer with 8-bit AdamW, as a fit takes it."""
    import bitsandbytes
    import torch
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.optim import AdamW8bit

    device, place = ("cuda", "the GPU") if torch.cuda.is_available() else ("cpu", "the CPU")
    layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    x = torch.nn.Parameter(torch.ones(32, 128, device=device))  # of fewer than 4,096 numbers the state has 32 bits
    optimizer = AdamW8bit([x], lr=1e-2, weight_decay=0.0)
    layer(x).sum().backward()
    optimizer.step()
    if not x.isfinite().all() or x.eq(1).all():
        raise ArithmeticError("a step through a 4-bit layer gives wrong numbers")
    if not any(getattr(state, "dtype", None) == torch.uint8 for state in optimizer.state[x].values()):
        raise ArithmeticError("8-bit AdamW does not keep its state in 8 bits")
    found = f"{bitsandbytes.__version__}, an NF4 layer and a step of 8-bit AdamW run on {place}"
    return [CheckResult("bitsandbytes", "ok", found)]


def _unsloth() -> list[CheckResult]:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    return [CheckResult("unsloth", "ok", f"{sys.modules['unsloth'].__version__}, imports")]


LIBRARY_CHECKS = {"torch": _torch, "bitsandbytes": _bitsandbytes, "unsloth": _unsloth}

if __name__ == "__main__":
    main(sys.argv[1:])
