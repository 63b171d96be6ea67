"""JSON and JSONL files, row by row: what is no text becomes its JSON, and every fault has its row or line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.data.encoding import open_utf8
from medlit.data.prompt import whole_characters
from medlit.errors import UserError

if TYPE_CHECKING:
    from medlit.data.settings import Columns

_CHUNK = 1 << 20  # characters of JSON read at once
_MAX_OBJECT = 1 << 26  # characters in one JSON object
_LOOK_AHEAD = 100  # objects whose keys make the columns of a JSON table


def _objects(path: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (where it stands, object) for each row of a JSON array, of JSON Lines, or of objects in a row."""
    values = _lines(path) if path.lower().endswith(".jsonl") else _values(path)
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"data.source: {path}, {where}: expected an object with one note's columns; write {{...}}.")
        yield where, value


def _lines(path: str) -> Iterator[tuple[str, object]]:
    with open_utf8(Path(path), newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    last = not any(rest.strip() for rest in file)
                    what = "breaks off: the last line is not complete JSON" if last else "the line is not valid JSON"
                    raise UserError(
                        f"data.source: {path}, line {number}: {what}; mend the line or export the table again."
                    ) from None
                yield f"line {number}", value


def _values(path: str) -> Iterator[tuple[str, object]]:
    """Decode a `.json` file value by value, so that memory holds one chunk and never the whole table."""
    decoder = json.JSONDecoder()
    with open_utf8(Path(path), newline="") as file:
        pending, at = file.read(_CHUNK).lstrip(), 0
        array = pending.startswith("[")
        at = int(array)
        for number in itertools.count(1):
            while True:
                while at < len(pending) and pending[at] in " \t\r\n,":
                    at += 1
                if array and pending.startswith("]", at):
                    return
                try:
                    value, at = decoder.raw_decode(pending, at)
                    break
                except (ValueError, RecursionError):
                    more = file.read(max(_CHUNK, len(pending) - at))
                    if not more and at == len(pending) and not array:
                        return
                    if not more or len(pending) - at > _MAX_OBJECT:
                        raise UserError(
                            f"data.source: {path}, row {number}: the JSON breaks off or is not valid here; mend the"
                            " file or export the table again."
                        ) from None
                    pending, at = pending[at:] + more, 0
            yield f"row {number}", value


def json_columns(path: Path) -> tuple[str, ...]:
    """Columns of a JSON table: every key of its first objects, in order of appearance."""
    rows = itertools.islice(_objects(str(path)), _LOOK_AHEAD)
    names = tuple(dict.fromkeys(name for _, row in rows for name in row if _as_text(name) == name))
    if not names:
        raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
    return names


def json_rows(path: str, names: tuple[str, ...], columns: Columns) -> Iterator[dict[str, str | None]]:
    """Yield column -> text of each object; a column that it lacks is null.

    Raises:
        UserError: naming the row or line.
    """
    used = {name for name in (columns.text, columns.label, columns.id or "id") if name is not None}
    for where, row in _objects(path):
        for name in used & row.keys():
            value = row[name]
            if isinstance(value, (list, dict)) or (name == columns.text and not isinstance(value, str | None)):
                kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "a number"
                raise UserError(
                    f"data.source: {path}, {where}: column {name!r} holds {kind} where text belongs; mend the row or"
                    " name another column."
                )
        yield {name: _as_text(row.get(name)) for name in names}


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    return whole_characters(value if isinstance(value, str) else json.dumps(value))
