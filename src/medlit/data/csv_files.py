"""CSV and TSV files, row by row, with every value kept as text and every fault at its line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from medlit.data.encoding import open_utf8
from medlit.errors import UserError

_MAX_FIELD = 1 << 24  # characters; a longer field is a quote that nobody closed


def _records(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which the record begins, its fields); blank lines are passed over."""
    csv.field_size_limit(_MAX_FIELD)
    with open_utf8(Path(path), newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error:
                # The parser's own message is not passed on: some of them quote the text.
                raise UserError(
                    f"data.source: {path}, line {line}: a quoted field that begins here is not closed, or has a quote "
                    'inside it that is not doubled; write a quote inside a note as "".'
                ) from None
            if record:
                yield line, record


def csv_header(path: Path, delimiter: str) -> tuple[str, ...]:
    """Names of the columns, as the first record has them.

    Raises:
        UserError: naming the line.
    """
    _, header = next(_records(str(path), delimiter), (1, []))
    if not header:
        raise UserError(f"data.source: {path} has no text in it; it needs a header and at least one note.")
    names = tuple(name.strip() or f"column_{place}" for place, name in enumerate(header, start=1))
    if len(names) == 1:
        other = next((mark for mark in (",", "\t", ";", "|") if mark != delimiter and mark in names[0]), None)
        if other is not None:
            wanted = {",": "commas", "\t": "tabs"}[delimiter]
            raise UserError(
                f"data.source: {path}, line 1: the header is not separated by {wanted} but seems to be by {other!r}; "
                f"save the table with {wanted}" + (", or name it .tsv." if other == "\t" else ".")
            )
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"data.source: {path}, line 1: two columns are called {repeated[:40]!r}; rename one.")
    return names


def csv_rows(path: str, header: tuple[str, ...], delimiter: str) -> Iterator[dict[str, str | None]]:
    """Yield column -> value of each record behind the header.

    Raises:
        UserError: naming the line.
    """
    records = _records(path, delimiter)
    next(records)
    line = 0
    for line, record in records:
        if len(record) != len(header):
            raise UserError(
                f"data.source: {path}, line {line}: {len(record)} fields where the header has {len(header)}; put a"
                " note that contains the separator or a line break in double quotes."
            )
        yield dict(zip(header, record, strict=True))
    if line == 0:
        raise UserError(f"data.source: {path} has a header and no rows; it needs at least one note.")
