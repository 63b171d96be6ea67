"""The pip commands that fetch a lock for a named Python and machine, whatever Python runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medlit.errors import UserError

# glibc of RHEL 8 and everything later; pip takes each tag by itself. 5 and 12 are what manylinux1 and 2010 mean.
_GLIBC = range(28, 4, -1)


def platforms(machine: str) -> list[str]:
    """Platform tags of wheels that run on Linux from glibc 2.28 on, the newest first.

    Args:
        machine: as `uname -m` says, such as x86_64.
    """
    return [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC] + [f"manylinux2014_{machine}", f"linux_{machine}"]


def commands(root: Path, wheels: Path, build: str, python: str, machine: str) -> list[list[str]]:
    """The downloads, in their order: PyTorch with what it asks for, then the lock and nothing else.

    Args:
        root: a checkout.
        wheels: folder to fetch to.
        build: `cpu` or `gpu`, the lock's name.
        python: version of the Python that will install them, such as 3.12.
        machine: see `platforms`.
    """
    lock = root / "requirements" / f"{build}.txt"
    first = re.findall(r"^torch(?:vision)?==\S+", lock.read_text("utf-8"), re.MULTILINE)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(wheels)]
    fetch += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    fetch += [argument for tag in platforms(machine) for argument in ("--platform", tag)]
    base = str(root / "requirements" / "base.txt")
    return [[*fetch, "--constraint", base, *first], [*fetch, "--no-deps", "--requirement", str(lock)]]


def own_wheel(source: Path, wheels: Path) -> list[str]:
    """The command that builds medlit's wheel with the setuptools that was fetched.

    Args:
        source: a copy of the sources, where building may leave what it likes.
        wheels: folder with setuptools, and to build to.
    """
    built = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return [*built, "--no-index", "--find-links", str(wheels), "--wheel-dir", str(wheels), str(source)]


def run(command: Sequence[str]) -> None:
    """Run one of them.

    Raises:
        UserError: a package is not to be had for this Python and machine, or the network is not there.
    """
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = (errors or done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"bundle: pip could not fetch everything ({said.rstrip('.')}); look at the network, and at the lock for the"
            " Python and machine that were asked for."
        )
