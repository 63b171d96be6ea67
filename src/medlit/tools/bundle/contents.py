"""What goes into a bundle's folder, and from where."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medlit._version import __version__
from medlit.atomic_io import atomic_dir
from medlit.paths import hub_cache_dir, hub_home
from medlit.tools.bundle.pip import commands, own_wheel, run

SUMS = "SHA256SUMS"
_SOURCES = ("src", "pyproject.toml", "LICENSE", "README.md")
_JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info")
# A Hub id where a config names a base model or a source of notes.
_NAMED = re.compile(r"^\s*(base_model|source):\s*[\"']?([\w.-]+/[\w.-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """The machine that a bundle is for.

    Attributes:
        build: `cpu` or `gpu`.
        python: its Python, such as 3.12.
        machine: its processor, such as x86_64.
    """

    build: str
    python: str
    machine: str

    @property
    def folder(self) -> str:
        """The bundle's name."""
        return f"medlit-{__version__}-{self.build}-python{self.python}-{self.machine}"


def named(configs: Iterable[Path]) -> list[str]:
    """Base models and data sets of the Hub that configs name: `models/owner/name`, `datasets/owner/name`.

    Read by a pattern: where a bundle is made there need not be a YAML parser.
    """
    kinds = {"base_model": "models", "source": "datasets"}
    found = (match for config in configs for match in _NAMED.findall(config.read_text("utf-8")))
    return sorted({f"{kinds[key]}/{name}" for key, name in found})


def cached(name: str) -> list[Path]:
    """Folders of the Hub's caches that hold a base model or data set; none where it is not cached.

    Args:
        name: as `named` gives it.
    """
    kind, owner, repo = name.split("/")
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or hub_home() / "datasets")
    places = [hub_cache_dir() / f"{kind}--{owner}--{repo}"]
    if kind == "datasets":
        places.append(prepared / f"{owner}___{repo}".lower())
    return [place for place in places if place.is_dir()]


def collect(root: Path, folder: Path, target: Target, caches: Sequence[Path]) -> None:
    """Fill a bundle's folder; it appears whole or not at all.

    Args:
        root: a checkout.
        folder: the bundle; it does not exist.
        target: the machine that it is for.
        caches: folders of the Hub's caches to take along.

    Raises:
        UserError: a package is not to be had, or the folder cannot be written.
    """
    with atomic_dir(folder) as beside:
        wheels = beside / "wheels"
        wheels.mkdir()
        for command in commands(root, wheels, target.build, target.python, target.machine):
            run(command)
        with tempfile.TemporaryDirectory() as name:
            source = copy_sources(root, Path(name) / "medlit")
            run(own_wheel(source, wheels))
        for kept in ("configs", "requirements"):
            shutil.copytree(root / kept, beside / kept)
        for kept in ("LICENSE", "README.md"):
            shutil.copy(root / kept, beside)
        for cache in caches:
            # In the Hub's cache a snapshot's files are links to its blobs, relative ones.
            place = "hub" if "--" in cache.name else "datasets"
            shutil.copytree(cache, beside / place / cache.name, symlinks=True)
        shutil.copy(Path(__file__).with_name("install.sh"), beside)
        text = f"BUNDLE_PYTHON={target.python}\nBUNDLE_BUILD={target.build}\nBUNDLE_MACHINE={target.machine}\n"
        (beside / "bundle.env").write_text(text, encoding="utf-8")
        (beside / SUMS).write_text(sums(beside), encoding="utf-8")
    folder.chmod(0o755)  # it holds nothing private and is to be read by others


def copy_sources(root: Path, folder: Path) -> Path:
    """Copy what medlit's wheel is built from; what an earlier build left in a checkout stays out of it."""
    folder.mkdir()
    for name in _SOURCES:
        path = root / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=_JUNK)
        else:
            shutil.copy(path, folder / name)
    return folder


def sums(folder: Path) -> str:
    """A line for every file of a folder, as `sha256sum --check` reads them; links lead to files that have one."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)
