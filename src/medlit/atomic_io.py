"""Files and folders that appear whole or not at all, and the message for a disk or folder that takes no more."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medlit.errors import UserError

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
def atomic_write(path: Path) -> Iterator[Path]:
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
        UserError: as for `atomic_write`.
    """
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Write a folder so that each of its files appears whole: a folder beside it to write to, moved in at the end.

    Where there is one already, file by file takes its predecessor's place, in the order of their names, and those
    without a successor go last: at no moment is a file missing that stands in both.

    Raises:
        UserError: as for `atomic_write`.
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


def remove_partial(path: Path) -> None:
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
