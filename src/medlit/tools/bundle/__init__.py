"""`make bundle`: everything that medlit needs on a machine without a network, in one folder to carry there.

    medlit-0.1.0-cpu-python3.11-x86_64/
      install.sh       checks the sums, makes .venv, installs, runs the doctor; asks no network for anything
      SHA256SUMS       of every file
      wheels/          the locked packages and medlit's own
      requirements/    the lock
      configs/
      hub/, datasets/  base models and data sets that the configs name, where this machine's caches hold them
      bundle.env       for which Python and build it is

It runs from a checkout with nothing but Python and pip: what is bundled need not be installed here, nor be for this
Python. The quickstart's weights are one of the wheels. Notes of one's own are never in a bundle.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from medlit.errors import UserError
from medlit.tools.bundle.contents import Target, cached, collect, named
from medlit.tools.bundle.pip import commands

ROOT = Path(__file__).parents[4]


def main(args: Sequence[str] | None = None) -> int:
    """Make a bundle, whole or not at all.

    Args:
        args: command line arguments; by default those of the process.

    Returns:
        0; 2 after a mistake, told in a sentence on standard error.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(prog="python -m medlit.tools.bundle", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--build", choices=("cpu", "gpu"), default="cpu", help="the lock (default: cpu)")
    parser.add_argument("--python", default=here, help=f"version of the Python it is for, as 3.12 (default: {here})")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="where to put the folder (default: dist)")
    parser.add_argument(
        "--config", type=Path, action="append", help="bring along its base model and data set (default: all configs)"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched and copied, and stop")
    options = parser.parse_args(args)
    try:
        _bundle(options)
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        return 2
    return 0


def _bundle(options: argparse.Namespace) -> None:
    """Make what the command line asks for.

    Raises:
        UserError: this is no checkout, the Python is not supported, the folder is there, or a package is not to be had.
    """
    if not (ROOT / "requirements" / "base.txt").is_file():
        raise UserError("bundle: there is no lock beside this medlit; run 'make bundle' in a checkout of it.")
    if options.python not in ("3.11", "3.12"):
        raise UserError(
            f"bundle: medlit runs on Python 3.11 and 3.12, not {options.python}; name one of them (make bundle"
            " FOR=3.12)."
        )
    target = Target(options.build, options.python, platform.machine())
    names = named(options.config or sorted((ROOT / "configs").rglob("*.yaml")))
    found = {name: cached(name) for name in names}
    if brought := [name for name, folders in found.items() if folders]:
        print(f"From this machine's caches: {', '.join(brought)}.")
    if absent := [name for name, folders in found.items() if not folders]:
        print(f"Named by the configs, not in this machine's caches and so not in the bundle: {', '.join(absent)}.")
    if options.dry_run:
        for command in commands(ROOT, Path("wheels"), target.build, target.python, target.machine):
            print(shlex.join(command))
        return
    folder = options.output / target.folder
    if folder.exists():
        raise UserError(f"bundle: {folder} is there already; remove it first, or name another place with --output.")
    collect(ROOT, folder, target, [place for folders in found.values() for place in folders])
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink())
    print(f"{folder}: {size / 1e6:,.0f} MB; carry it there and run: bash {folder.name}/install.sh")
