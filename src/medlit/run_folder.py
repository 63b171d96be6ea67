"""Run folders: how they are named, and which files `best` and `last` are.

logs/<config>/version_N/
    config_<verb>.yaml   <verb>_metrics.json   confusion_<verb>.png   events.out.tfevents.*
    <verb>_answers.parquet   checkpoints/best.ckpt   checkpoints/last.ckpt   adapter/   predictions.csv
    report.html   report.md   test_facts.json   baseline_<name>_metrics.json   baseline_<name>_answers.parquet
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from medlit.errors import UserError

DEFAULT_NAME = "medlit"
ALIASES = ("best", "last")
_VERSION = re.compile(r"version_(\d+)")


def run_name(configs: Sequence[str | Path]) -> str:
    """The name of a run: its configs' names joined, without those of a `hardware` folder.

    >>> run_name(["configs/llama31_8b.yaml", "configs/hardware/ddp.yaml"])
    'llama31_8b'
    """
    stems = [path.stem for path in map(Path, configs) if path.parent.name != "hardware"]
    return "-".join(stems) or DEFAULT_NAME


def versions(root: Path, name: str) -> list[Path]:
    """Run folders of one name, newest first."""
    found = [
        (int(match[1]), path) for path in (root / name).glob("version_*") if (match := _VERSION.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def next_version(root: Path, name: str) -> Path:
    """The folder of the next run."""
    taken = [int(path.name.removeprefix("version_")) for path in versions(root, name)]
    return root / name / f"version_{max(taken, default=-1) + 1}"


def claim_version(root: Path, name: str) -> Path:
    """Make the folder of the next run; processes that do so at the same time get one each."""
    first = next_version(root, name)
    for number in count(int(first.name.removeprefix("version_"))):
        folder = first.with_name(f"version_{number}")
        try:
            make_private(folder, exist_ok=False)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("the numbers do not end")


def make_private(folder: Path, exist_ok: bool = True) -> None:
    """Make a folder that only its owner can read; an existing one keeps its mode.

    Raises:
        FileExistsError: it exists, and must not.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=exist_ok)


def remove_if_empty(folder: Path) -> None:
    """Remove a run folder that nothing was written to, and the folders above it that held nothing else."""
    for path in (folder, folder.parent, folder.parent.parent):
        with suppress(OSError):  # there is something in it
            path.rmdir()


@contextmanager
def sole_fit(folder: Path) -> Iterator[None]:
    """Keep other fits out of a run folder; the system lifts the lock when this process ends, however it does.

    Raises:
        UserError: another fit is writing to the folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"run_dir: another fit is writing to {folder}; wait for its end, or name another folder."
                ) from error
        yield
    finally:
        os.close(handle)


def check_unused(run: Path, checkpoint: Path | None) -> None:
    """Check that a fit does not write over another one's weights: it continues those of its folder, or finds none.

    Raises:
        UserError: the folder holds checkpoints, and the fit does not start from one of them.
    """
    held = [run / "checkpoints" / f"{name}.ckpt" for name in ALIASES]
    if not any(path.exists() for path in held):
        return
    if checkpoint is None or checkpoint.parent.resolve() != held[0].parent.resolve():
        raise UserError(
            f"run_dir: {run} holds the checkpoints of another fit, which a new one would replace; add --ckpt_path last"
            " to continue that one, or name a new folder."
        )


def resolve_checkpoint(wanted: str, root: Path, name: str, run: Path | None) -> Path:
    """Find the file that `--ckpt_path` means.

    Args:
        wanted: 'best', 'last' or a path.
        root: folder of the run folders, `logs` by default.
        name: of the runs to search, newest first.
        run: search this run folder alone.

    Raises:
        UserError: there is no such file.
    """
    if wanted not in ALIASES:
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UserError(f"ckpt_path: there is no file {path}; give 'best', 'last' or the path of a checkpoint.")
        return path
    folders = [run] if run is not None else versions(root, name)
    for folder in folders:
        path = folder / "checkpoints" / f"{wanted}.ckpt"
        if path.is_file():
            return path
    searched = str(run) if run is not None else f"any run in {root / name}"
    raise UserError(f"ckpt_path: there is no {wanted} checkpoint in {searched}; run 'medlit fit' first or name a file.")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that holds a checkpoint, or None when it lies elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
