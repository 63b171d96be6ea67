"""One file of notes -> a memory-mapped table of its columns as they stand.

CSV, TSV, JSON and JSONL are parsed by medlit, row by row and with every value kept as text, and handed to `datasets`,
which writes them to its Arrow cache once: its own CSV reader turns a note that says `None` into a missing one and an id
of `007` into 7, and names no line when a row is ragged. Parquet has types of its own and goes through `datasets` as it
is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.data.cache import cache_folder, cache_key
from medlit.data.csv_files import csv_header, csv_rows
from medlit.data.encoding import not_utf8
from medlit.data.json_files import json_columns, json_rows
from medlit.data.settings import Columns
from medlit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1  # part of the cache's key: raise it when the same file would be read otherwise

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_file(path: Path, columns: Columns) -> Dataset:
    """Read one table; the second time it comes from the cache of `datasets`, unless the file has changed.

    Raises:
        UserError: whatever keeps the file from being read, with the line or row.
    """
    if path.stat().st_size == 0:
        raise UserError(f"data.source: {path} is empty; it needs a header and at least one note.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix in _DELIMITERS:
            header = csv_header(path, _DELIMITERS[suffix])
            return _cached(path, header, csv_rows, {"header": header, "delimiter": _DELIMITERS[suffix]})
        names = json_columns(path)
        return _cached(path, names, json_rows, {"names": names, "columns": columns})
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _cached(
    path: Path,
    names: tuple[str, ...],
    rows: Callable[..., Iterator[dict[str, str | None]]],
    settings: dict[str, object],
) -> Dataset:
    """Run a row generator into the Arrow cache, or take what an earlier run left there.

    Args:
        path: the file.
        names: its columns.
        rows: the generator; it gets the path and the settings.
        settings: no lists among them, which `datasets` would take for shards.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    found = path.stat()
    stamp = (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    try:
        return Dataset.from_generator(
            rows,
            features=Features({name: Value("string") for name in names}),
            cache_dir=str(cache_folder()),
            gen_kwargs={"path": str(path), **settings},
            fingerprint=cache_key(VERSION, stamp, sorted(settings.items())),
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, (UserError, UnicodeDecodeError)):
            raise cause from None
        raise


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if pq.read_metadata(path).num_rows == 0:
            raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
        return Dataset.from_parquet(str(path), cache_dir=str(cache_folder()))
    except (pa.ArrowException, OSError, DatasetGenerationError):
        raise UserError(
            f"data.source: {path} is not a whole Parquet file (cut short, or another format); copy or export it again."
        ) from None
