"""Run folders: how a run is named, which file the words `best` and `last` mean, and how a file appears whole.

logs/<config>/version_N/
    config_<verb>.yaml   <verb>_metrics.json   confusion_<verb>.png   events.out.tfevents.*
    <verb>_answers.parquet   checkpoints/best.ckpt   checkpoints/last.ckpt   adapter/   predictions.csv
    report.html   report.md   test_facts.json   baseline_<name>_metrics.json   baseline_<name>_answers.parquet
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medlit.errors import UserError

DEFAULT_NAME = "medlit"
WORDS = ("best", "last")
_VERSION = re.compile(r"version_(\d+)")


def run_name(configs: Sequence[str | Path]) -> str:
    """The name of a run: its configs' names joined, less those of a `hardware` folder: a machine is no experiment.

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
    """The folder that the next run gets."""
    taken = [int(path.name.removeprefix("version_")) for path in versions(root, name)]
    return root / name / f"version_{max(taken, default=-1) + 1}"


def resolve_checkpoint(wanted: str, root: Path, name: str, run: Path | None) -> Path:
    """Find the file behind `--ckpt_path`.

    Args:
        wanted: 'best', 'last' or a path.
        root: where run folders are, `logs` by default.
        name: of the runs to look through, newest first.
        run: look in this run folder alone.

    Raises:
        UserError: there is no such file.
    """
    if wanted not in WORDS:
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UserError(f"ckpt_path: there is no file {path}; give 'best', 'last' or the path of a checkpoint.")
        return path
    places = [run] if run is not None else versions(root, name)
    for place in places:
        path = place / "checkpoints" / f"{wanted}.ckpt"
        if path.is_file():
            return path
    where = str(run) if run is not None else f"any run in {root / name}"
    raise UserError(f"ckpt_path: there is no {wanted} checkpoint in {where}; run 'medlit fit' first or name a file.")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None when it lies elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


# What a disk or a folder answers that takes no more, whoever asks.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def unwritable(error: OSError, path: Path | None = None) -> UserError | None:
    """What to tell someone whose disk is full or whose folder is closed; None where an error is another one.

    Args:
        error: what the system said.
        path: the file or folder that was to be written.
    """
    if error.errno not in _UNWRITABLE:
        return None
    what = path or error.filename or "a file of this run"
    return UserError(
        f"{what} cannot be written ({os.strerror(error.errno)}); make room or choose another folder: what was whole"
        " before is as it was."
    )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all: a path beside it to write to, renamed at the end.

    A process that is killed and a machine that loses its power in the middle leave the file as it was before. Readable
    by its owner alone.

    Raises:
        UserError: the disk is full, or the folder is not open to this user; the file is as it was before.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def write_json(path: Path, values: object) -> None:
    """Write values as indented JSON; the file appears whole.

    Raises:
        UserError: as for `whole_file`.
    """
    with whole_file(path) as beside:
        beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder so that each of its files appears whole: a folder beside it to write to, moved in at the end.

    Where there is one already, file by file takes its predecessor's place, in the order of their names, and those
    without a successor go last: at no moment is a file missing that stands in both.

    Raises:
        UserError: as for `whole_file`.
    """
    with _told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            beside = Path(name) / folder.name
            beside.mkdir(mode=0o700)
            yield beside
            if not folder.exists():
                for file in beside.rglob("*"):
                    _flush(file)
                replace(beside, folder)
                return
            files = sorted(file.relative_to(beside) for file in beside.rglob("*") if file.is_file())
            for file in files:
                (folder / file).parent.mkdir(mode=0o700, exist_ok=True)
                replace(beside / file, folder / file)
            for file in folder.rglob("*"):
                if file.is_file() and file.relative_to(folder) not in files:
                    file.unlink()


def replace(new: Path, old: Path) -> None:
    """Put a file or folder in another's place in one move, once its bytes have reached the disk."""
    _flush(new)
    os.replace(new, old)
    _flush(old.parent)


def remove_halves(path: Path) -> None:
    """Remove what processes that were killed while they wrote a file or folder have left beside it."""
    for half in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = unwritable(error, path)
        if told is None:
            raise
        raise told from error
