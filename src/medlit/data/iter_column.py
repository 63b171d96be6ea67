"""A column's texts, one after the other, from the files that hold them and not through their mapping.

Pages of a mapped file that were read count as this process's memory for as long as the table lives: reading a million
notes once would add all their gigabytes. What is read here is let go of batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1_000  # rows


def iter_column(rows: Dataset, column: str) -> Iterator[str | None]:
    """Yield the values of a column of text, in the order of the rows.

    Rows that are not simply those of their files, because some were left out or are in memory or a column was renamed,
    come through the mapping.
    """
    import pyarrow as pa

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
    """How many rows there are in Arrow files that have these columns; their values are not read."""
    import pyarrow as pa

    rows = 0
    for file in files:
        with pa.memory_map(file) as source, pa.ipc.open_stream(source) as batches:
            if set(columns) <= set(batches.schema.names):
                rows += sum(len(batch) for batch in batches)
    return rows
