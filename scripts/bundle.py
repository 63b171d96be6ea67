"""`make bundle`: one folder with everything that medlit needs on a machine without a network.

    medlit-0.2.0-cpu-python3.11-x86_64/
      install.sh         checks the sums, makes .venv, installs and runs the doctor, all offline
      SHA256SUMS         of every file
      wheels/            the locked packages and medlit itself
      requirements/      the lock
      configs/
      hub/, datasets/    base models and data sets that the configs name, where this machine has them cached
      bundle.env         the Python, build and processor that it is for

It runs from a checkout with only Python and pip: the bundled packages need not be installed here or fit this Python.
The quickstart's weights are one of the wheels. A bundle never contains the user's own notes.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from medlit import __version__
from medlit.atomic_io import atomic_dir
from medlit.cli import end_on_signals
from medlit.errors import UserError

ROOT = Path(__file__).parents[1]
SUMS = "SHA256SUMS"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# A Hub id that a config names; matched by a pattern, since a YAML parser may not be installed.
_HUB_ID = re.compile(
    r"^\s*(base_model|source):\s*[\"']?([\w.-]+/[\w.-]+)(?::[^\"'#\n]+)?[\"']?\s*(?:#.*)?$", re.MULTILINE
)


class Target(NamedTuple):
    """The machine that a bundle is for: the lock (`cpu` or `gpu`), Python (3.12) and processor (x86_64)."""

    build: str
    python: str
    machine: str

    @property
    def folder(self) -> str:
        """The bundle's name."""
        return f"medlit-{__version__}-{self.build}-python{self.python}-{self.machine}"


def main(args: Sequence[str] | None = None) -> int:
    """Make a bundle; returns the exit code, 2 after a user's mistake."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(prog="python scripts/bundle.py", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--build", choices=("cpu", "gpu"), default="cpu", help="the lock (default: cpu)")
    add("--python", choices=("3.11", "3.12"), default=here, help=f"the target's Python version (default: {here})")
    add("--output", type=Path, default=Path("dist"), help="parent of the bundle (default: dist)")
    add("--config", type=Path, action="append", help="include its base model and data set (default: all configs)")
    add("--dry_run", action="store_true", help="print what would be fetched and copied, and stop")
    try:
        _bundle(parser.parse_args(args))
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        return 2
    return 0


def _bundle(options: argparse.Namespace) -> None:
    target = Target(options.build, options.python, platform.machine())
    folder = options.output / target.folder
    caches = {name: cached(name) for name in hub_names(options.config or sorted((ROOT / "configs").rglob("*.yaml")))}
    if included := [name for name, folders in caches.items() if folders]:
        print(f"From this machine's caches: {', '.join(included)}.")
    if absent := [name for name, folders in caches.items() if not folders]:
        print(f"Named by the configs but not cached here, so not in the bundle: {', '.join(absent)}.")
    if options.dry_run:
        for command in download_commands(Path("wheels"), target):
            print(shlex.join(command))
        return
    if folder.exists():
        raise UserError(f"bundle: {folder} exists already; remove it first, or choose another place with --output.")
    write_bundle(folder, target, [place for folders in caches.values() for place in folders])
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink())
    print(f"{folder}: {size / 1e6:,.0f} MB; copy it to the other machine and run: bash {folder.name}/install.sh")


def hub_names(configs: Iterable[Path]) -> list[str]:
    """Base models and data sets of the Hub that configs name: `models/owner/name`, `datasets/owner/name`."""
    kinds = {"base_model": "models", "source": "datasets"}
    matches = (match for config in configs for match in _HUB_ID.findall(config.read_text("utf-8")))
    return sorted({f"{kinds[key]}/{name}" for key, name in matches})


def cached(name: str) -> list[Path]:
    """Folders of the Hub's caches that hold a base model or data set, named as by `hub_names`."""
    kind, owner, repo = name.split("/")
    # As huggingface_hub finds them, which may not be installed.
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{user}/huggingface").expanduser()
    folders = [Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser() / f"{kind}--{owner}--{repo}"]
    if kind == "datasets":
        prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
        folders.append(prepared / f"{owner}___{repo}".lower())
    return [folder for folder in folders if folder.is_dir()]


def write_bundle(folder: Path, target: Target, caches: Sequence[Path]) -> None:
    """Write a bundle with these folders of the Hub's caches, whole or not at all."""
    with atomic_dir(folder) as partial:
        wheels = partial / "wheels"
        wheels.mkdir()
        for command in download_commands(wheels, target):
            run_pip(command)
        with tempfile.TemporaryDirectory() as source:
            copy_sources(Path(source))
            run_pip(build_command(Path(source), wheels))
        for name in ("configs", "requirements"):
            shutil.copytree(ROOT / name, partial / name)
        for file in (ROOT / "LICENSE", ROOT / "README.md", Path(__file__).with_name("install.sh")):
            shutil.copy(file, partial)
        for cache in caches:
            # The files of a snapshot in the Hub's cache are relative links to its blobs.
            kind = "hub" if "--" in cache.name else "datasets"
            shutil.copytree(cache, partial / kind / cache.name, symlinks=True)
        variables = f"BUNDLE_PYTHON={target.python}\nBUNDLE_BUILD={target.build}\nBUNDLE_MACHINE={target.machine}\n"
        (partial / "bundle.env").write_text(variables, encoding="utf-8")
        (partial / SUMS).write_text(checksums(partial), encoding="utf-8")
    folder.chmod(0o755)  # nothing in it is private, and others install from it


def download_commands(wheels: Path, target: Target) -> list[list[str]]:
    """The downloads in order: PyTorch with its dependencies, then exactly the lock, and that of `medlit serve`."""
    lock, serve = (ROOT / "requirements" / f"{name}.txt" for name in (target.build, "serve"))
    torch = re.findall(r"^torch(?:vision)?==\S+", lock.read_text("utf-8"), re.MULTILINE)
    fetch = [*_PIP, "download", "--dest", str(wheels), "--only-binary", ":all:", "--implementation", "cp"]
    fetch += ["--python-version", target.python]
    fetch += [argument for tag in platform_tags(target.machine) for argument in ("--platform", tag)]
    base = str(ROOT / "requirements" / "base.txt")
    locked = [*fetch, "--requirement", str(serve), "--no-deps", "--requirement", str(lock)]
    return [[*fetch, "--constraint", base, *torch], locked]


def platform_tags(machine: str) -> list[str]:
    """Tags of wheels that run on Linux with glibc 2.28 or later, newest first; `machine` is that of `uname -m`."""
    # glibc 2.28 is that of RHEL 8; pip takes each tag literally. 5 and 12 are manylinux1 and manylinux2010.
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)]
    return [*tags, f"manylinux2014_{machine}", f"linux_{machine}"]


def copy_sources(folder: Path) -> None:
    """Copy what medlit's wheel is built from, so that the build neither reads nor leaves old files in the checkout."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)


def build_command(source: Path, wheels: Path) -> list[str]:
    """Build medlit's wheel from a copy of its sources, with the setuptools that was fetched."""
    folder = str(wheels)
    return [*_PIP, "wheel", "--no-deps", "--no-index", "--find-links", folder, "--wheel-dir", folder, str(source)]


def run_pip(command: Sequence[str]) -> None:
    """Run a pip command, which may find no network, or no package for this Python and machine."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or ["no message"])[-1].removeprefix("ERROR: ").rstrip(".")
        raise UserError(
            f"bundle: pip could not fetch everything ({reason}); look at the network, and at the lock for the"
            " requested Python and machine."
        )


def checksums(folder: Path) -> str:
    """One line per file, in the format of `sha256sum --check`; links are left out, their targets have a line."""
    lines = ""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                lines += f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n"
    return lines


if __name__ == "__main__":
    end_on_signals()
    raise SystemExit(main())
