"""Parts -> one table in the order of the source, in memory that does not grow with the notes' text.

Batches go by the notes' length, so a part is in no order. Where each answer's line begins takes some 40 bytes a note;
the lines themselves are fetched one after the other from files that the system maps into memory.
"""

from __future__ import annotations

import csv
import itertools
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from medlit.atomic_io import atomic_write
from medlit.predictions.columns import COLUMNS, Row
from medlit.predictions.shards import Part

_CHUNK = 10_000  # rows that are in memory at a time
# What a spreadsheet takes for the beginning of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_table(parts: Sequence[Part], notes: int, path: Path) -> None:
    """Write a table; it appears whole.

    Args:
        parts: with its answers; of several to one note the last one counts.
        notes: how many the source has; those that no part answers are left out.
        path: the table; its suffix, one of `FORMATS`, says how it is written.
    """
    with atomic_write(path) as beside:
        FORMATS[path.suffix](beside, in_order(parts, notes))


def in_order(parts: Sequence[Part], notes: int) -> Iterator[Row]:
    """Yield the rows of parts by their place in the source."""
    part = np.full(notes, -1, dtype=np.int32)
    offset = np.zeros(notes, dtype=np.int64)
    for number, one in enumerate(parts):
        part[one.rows] = number
        offset[one.rows] = one.offsets
    with ExitStack() as open_:
        lines = [_mapped(one, open_) if len(one.rows) else None for one in parts]
        for row in np.flatnonzero(part >= 0):
            file = lines[part[row]]
            if file is not None:
                file.seek(offset[row])
                yield json.loads(file.readline())


def _mapped(part: Part, open_: ExitStack) -> mmap.mmap:
    file = open_.enter_context(part.path.open("rb"))
    return open_.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # Quoted throughout: the csv module itself leaves a lone carriage return bare, which ends a row.
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_harmless(row[name]) for name in COLUMNS] for row in rows)


def _harmless(value: Any) -> Any:  # noqa: ANN401 - whatever a cell holds
    """Keep a spreadsheet from running a text as a formula: it takes what follows an apostrophe as it is."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.string(), pa.string(), pa.float64(), pa.float64(), pa.string(), pa.bool_(), pa.int64())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    rest = iter(rows)

    def batch() -> Any:  # noqa: ANN401 - pyarrow has no types; a RecordBatch
        return pa.RecordBatch.from_pylist(list(itertools.islice(rest, _CHUNK)), schema=schema)

    with pq.ParquetWriter(path, schema) as writer:
        while len(made := batch()):
            writer.write_batch(made)


FORMATS: dict[str, Callable[[Path, Iterable[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
