"""Files and folders that appear whole or not at all, and the message for a full disk or a read-only folder."""

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medlit.errors import UserError

# Errors of a full disk or a read-only folder.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_unfinished: set[Path] = set()  # temporary files and folders of this process; most are gone


@contextmanager
def explained(path: Path | None = None) -> Iterator[None]:
    """Make a UserError of a full disk or a read-only folder, while `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        what = path or error.filename or "a file of this run"
        raise UserError(
            f"{what} cannot be written ({os.strerror(error.errno)}); free some space or choose another folder; existing"
            " files are unchanged."
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all: yields a temporary path beside it, renamed at the end.

    A killed process or a power cut leaves the old file unchanged. The new one is readable by its owner alone. A link
    stays, and its target is written. Raises a UserError if the disk is full or the folder is read-only.
    """
    with explained(path):
        path = link_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        _unfinished.add(temporary)
        try:
            yield temporary
            replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def link_target(path: Path) -> Path:
    """The file to write for a path: a link's target, but the link in the Hub's cache, where revisions share targets."""
    if not path.is_symlink():
        return path
    from huggingface_hub.constants import HF_HUB_CACHE  # `import_unsloth` sets variables that it reads

    target = Path(os.path.realpath(path))
    return path if Path(HF_HUB_CACHE).resolve() in target.parents else target


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object."""
    return {**json.loads(path.read_text(encoding="utf-8"))}  # a TypeError for anything else


def write_json(path: Path, values: object) -> None:
    """Write values as indented JSON; the file appears whole. Raises as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Write a folder so that each of its files appears whole: yields a temporary folder beside it, moved at the end.

    An existing folder is replaced file by file, in the order of their names, and files that the new one lacks are
    removed last: at no moment is a file missing that both have. Raises as `atomic_write` does.
    """
    with explained(folder):
        folder = link_target(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_dir(f".{folder.name}-", folder.parent) as beside:
            temporary = beside / folder.name
            temporary.mkdir(mode=0o700)
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
            try:
                replace(temporary, folder)
                return
            except OSError:  # also where the folder holds files; they are replaced one by one
                if not (temporary.is_dir() and folder.is_dir()):
                    raise
            files = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
            for file in files:
                (folder / file).parent.mkdir(mode=0o700, exist_ok=True)
                replace(temporary / file, folder / file)
            for file in folder.rglob("*"):
                if file.is_file() and file.relative_to(folder) not in files:
                    file.unlink()


@contextmanager
def temporary_dir(prefix: str, parent: Path) -> Iterator[Path]:
    """Make a temporary folder that is removed at the end, and when a signal ends the process."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name:
        _unfinished.add(Path(name))
        yield Path(name)


def remove_unfinished() -> None:
    """Remove what this process is writing, before it ends without its `finally` blocks."""
    for path in _unfinished:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def replace(new: Path, old: Path) -> None:
    """Replace a file or folder by another in one move, after its bytes have reached the disk."""
    _flush(new)
    os.replace(new, old)
    _flush(old.parent)


def lock(file: int, taken: str) -> None:
    """Lock an open file or folder until it is closed, however this process ends; a UserError if another holds it."""
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(taken) from error


def remove_partial(path: Path) -> None:
    """Remove temporary files that killed processes have left beside a file or folder."""
    # The eight characters are tempfile's; an asterisk would also match what another process writes for `<stem>-2`.
    for partial in path.parent.glob(f".{glob.escape(path.stem)}-????????{glob.escape(path.suffix)}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
