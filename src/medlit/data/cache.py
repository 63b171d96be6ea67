"""The Arrow cache of notes: its folder and keys, the tables that are written to it, and one column of a table."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medlit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 2  # part of the key of a file's table: raise it when the same file would be read differently

_BATCH = 1_000  # rows
Names = tuple[str, ...]


def cache_key(*parts: object) -> str:
    """Key of a cached table: 32 hexadecimal digits of everything that it depends on."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """The folder for the text of notes, in the cache of `datasets`; only its owner may enter it.

    What comes from the Hub is not copied here, because `datasets` must find it again offline.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "medlit"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE: {folder} cannot be made private ({error.strerror}), as notes must be; set"
            " HF_DATASETS_CACHE to a folder of your own."
        ) from error
    return folder


def cached_table(
    path: Path, names: Names, rows: Callable[..., Iterator[Any]], /, lists: Names = (), **settings: object
) -> Dataset:
    """Write what `rows` yields of a file to the Arrow cache, or map what an earlier run wrote.

    Every column holds text, and those named in `lists` lists of texts.

    The settings hold tuples and no lists, which `datasets` takes for shards. An error is the one that `rows` raises.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    text, status = Value("string"), path.stat()
    settings |= {"lists": lists} if lists else {}
    stamp = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    try:
        return Dataset.from_generator(
            rows,
            features=Features({name: List(text) if name in lists else text for name in names}),
            cache_dir=str(cache_folder()),
            gen_kwargs={"path": str(path), **settings},
            fingerprint=cache_key(VERSION, stamp, sorted(settings.items())),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def iter_column(rows: Dataset, column: str) -> Iterator[str | None]:
    """Yield the values of a text column in the order of the rows, from the files and not through their mapping.

    Pages of a mapped file count as this process's memory once they are read: one pass over a million notes would add
    gigabytes. Here every batch is released. Tables that are not simply the rows of their files (rows were selected, or
    are in memory, or a column was renamed) are read through the mapping.
    """
    files = [file["filename"] for file in rows.cache_files]
    if rows._indices is None and _rows_with(files, rows.column_names) == len(rows):
        for file in files:
            with pa.OSFile(file) as source, pa.ipc.open_stream(source) as batches:
                for batch in batches:
                    yield from batch.column(column).to_pylist()
        return
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH):
        yield from table.column(column).to_pylist()


def _rows_with(files: list[str], columns: list[str]) -> int:
    """Number of rows in those Arrow files that have these columns; no value is read."""
    rows = 0
    for file in files:
        with pa.memory_map(file) as source, pa.ipc.open_stream(source) as batches:
            if set(columns) <= set(batches.schema.names):
                rows += sum(len(batch) for batch in batches)
    return rows
