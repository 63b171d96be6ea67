"""What the doctor looks at in the machine: Python, PyTorch, GPU and driver, and whether the libraries work."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from typing import Any

from medlit.tools.doctor.check_result import REINSTALL, Row, version_of

Facts = dict[str, dict[str, Any]]


def python() -> Row:
    """The interpreter's version."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Row("Python", "ok", f"{version} at {sys.executable}")
    return Row("Python", "fail", version, "make an environment with Python 3.11 or 3.12, then: make install")


def system() -> Row:
    """Operating system, cores and memory."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    gib = page * os.sysconf("SC_PHYS_PAGES")
    return Row("system", "ok", f"{platform.platform()}, {os.cpu_count()} cores, {gib:.0f} GiB of memory")


def _finding(name: str, facts: Facts) -> dict[str, Any]:
    return facts.get(name) or facts.get("crash") or {"error": "not looked at"}


def torch(facts: Facts) -> Row:
    """PyTorch, and what it was built for."""
    found = _finding("torch", facts)
    if "error" in found:
        return Row("torch", "fail", found["error"], REINSTALL)
    return Row("torch", "ok", f"{found['version']}, built for {_cuda(found) or 'the CPU'}")


def _cuda(torch: dict[str, Any]) -> str:
    return f"CUDA {torch['cuda']}" if torch.get("cuda") else ""


def gpus(facts: Facts) -> list[Row]:
    """The GPUs that PyTorch can use, or why there is none."""
    torch = _finding("torch", facts)
    if found := torch.get("gpus"):
        precision = {True: "bf16", False: "no bf16, so fits run in 16-mixed (as configs/hardware/t4_16gb.yaml)"}
        return [
            Row(
                f"GPU {i}",
                "ok",
                f"{gpu['name']}, {gpu['free']} of {gpu['gib']} GiB free, {precision[gpu['bf16']]}",
            )
            for i, gpu in enumerate(found)
        ]
    if not _ask("nvidia-smi", "-L"):
        cure = "to fine-tune an 8B model: an NVIDIA GPU of 16 GiB or more"
        return [Row("GPU", "warn", "none: everything runs on the CPU", cure)]
    if _cuda(torch):
        cure = f"update the NVIDIA driver to one for {_cuda(torch)} (for CUDA 13: 580 or newer)"
        return [Row("GPU", "warn", "there is one and PyTorch cannot use it", cure)]
    return [Row("GPU", "warn", "there is one and PyTorch is built for the CPU", f"{REINSTALL} BUILD=gpu")]


def _ask(*command: str) -> str:
    """The standard output of a command, or nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def driver(facts: Facts) -> Row:
    """The NVIDIA driver, as nvidia-smi tells, against the CUDA that PyTorch is built for."""
    said = _ask("nvidia-smi")
    version = re.search(r"Driver Version:\s*([\d.]+)", said)
    if version is None:
        return Row("NVIDIA driver", "ok", "none (needed for a GPU only)")
    newest = re.search(r"CUDA[^|\n]*? Version:\s*([\d.]+)", said)
    found = version[1] + (f", for CUDA up to {newest[1]}" if newest else "")
    built = _cuda(_finding("torch", facts)).removeprefix("CUDA ")
    if newest and built and int(newest[1].split(".")[0]) < int(built.split(".")[0]):
        cure = f"update the driver (for CUDA 13: 580 or newer), or install a PyTorch for CUDA {newest[1]}"
        return Row("NVIDIA driver", "warn", f"{found}; PyTorch is built for CUDA {built}", cure)
    return Row("NVIDIA driver", "ok", found)


def nvcc() -> Row:
    """The CUDA compiler."""
    release = re.search(r"release (\S+),", _ask("nvcc", "--version"))
    return Row("nvcc", "ok", release[1] if release else "none (medlit compiles nothing with it)")


def imported(name: str, facts: Facts) -> Row:
    """Whether a library imports; being installed is not enough for those that load CUDA or patch others."""
    found = _finding(name, facts)
    if "error" not in found:
        return Row(name, "ok", f"{found['version']}, imports")
    cure = f"pip install --no-deps -r requirements/{_build(facts)}.txt"
    if _build(facts) == "cpu" and version_of("torchvision"):
        cure = "pip uninstall torchvision: it does not load beside a CPU build of torch, and Unsloth does without"
    return Row(name, "fail", found["error"], cure)


def _build(facts: Facts) -> str:
    return "gpu" if _cuda(_finding("torch", facts)) else "cpu"


def quantised(facts: Facts) -> Row:
    """Whether a 4-bit layer really computes here, forward and backward, and 8-bit AdamW steps."""
    found, optimizer = _finding("4-bit", facts), _finding("8-bit AdamW", facts)
    cure = f"pip install --no-deps -r requirements/{_build(facts)}.txt; if it stays, see 'python -m bitsandbytes'"
    for what, each in (("a 4-bit layer", found), ("8-bit AdamW", optimizer)):
        if "error" in each:
            return Row("4-bit training", "fail", f"{what}: {each['error']}", cure)
    where = {"cpu": "the CPU"}.get(found["device"], "the GPU")
    return Row(
        "4-bit training", "ok", f"NF4 forward and backward and a step of 8-bit AdamW, run on {where}: right results"
    )


def triton(facts: Facts) -> Row:
    """Whether Triton compiles for the GPU; without one nothing asks it to."""
    found = _finding("triton", facts)
    if "error" in found:
        cure = "install a C compiler and Python's headers (build-essential, python3-dev), or: " + REINSTALL
        return Row("Triton", "fail", found["error"], cure)
    if found["version"] is None:
        return Row("Triton", "ok", "not needed without a GPU")
    return Row("Triton", "ok", f"{found['version']}, a kernel compiled and run")
