"""Helpers of the tests of `medlit export`: run it on a run folder, and look at what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medlit.tools.export import run as export


def exported(run: Path, target: str, *flags: str) -> Path:
    """Export a run, verified on 6 notes."""
    output = run.parents[2] / "export"
    assert export(["--run_dir", str(run), "--to", target, "--output", str(output), "--notes", "6", *flags]) == 0
    return output


def verification(folder: Path) -> dict[str, Any]:
    """The verification of an export."""
    return json.loads((folder / "verification.json").read_text())


def files(folder: Path) -> set[str]:
    """Relative paths of the files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def left(run: Path) -> set[str]:
    """What is beside the logs."""
    return {path.name for path in run.parents[2].iterdir()} - {"logs"}
