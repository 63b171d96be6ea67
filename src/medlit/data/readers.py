"""One file of notes -> a memory-mapped table of its columns as they stand.

CSV, TSV, JSON and JSONL are parsed here, row by row and with every value kept as text, and handed to `datasets`, which
writes them to its Arrow cache once: its own CSV reader turns a note that says `None` into a missing one and an id of
`007` into 7, and names no line when a row is ragged. Parquet has types of its own and goes through `datasets` as it is.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.data.encoding import not_utf8, open_utf8
from medlit.errors import UserError
from medlit.prompts import whole_characters

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1  # part of the cache's key: raise it when the same file would be read otherwise

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_FIELD = 1 << 24  # characters; a longer field is a quote that nobody closed
_CHUNK = 1 << 20  # characters of JSON read at once
_MAX_OBJECT = 1 << 26  # characters in one JSON object
_LOOK_AHEAD = 100  # objects whose keys make the columns of a JSON table

Row = dict[str, str | None]


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Attributes:
        text: the note.
        label: its specialty; None when the table has no labels.
        id: names a note in predictions and reports. None: the column `id` if there is one, else the text's hash.
    """

    text: str = "transcription"
    label: str | None = "medical_specialty"
    id: str | None = None


def fingerprint(*parts: object) -> str:
    """Key of a cached table: 32 hexadecimal digits of everything that it depends on."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """Where the text of notes is kept: in the cache of `datasets`, a folder that nobody but its owner may enter.

    The files in it are as open as `datasets` makes them. What was fetched from the Hub is not copied here: `datasets`
    must find it again offline.

    Raises:
        UserError: the folder cannot be made, or is somebody else's.
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
            f"HF_DATASETS_CACHE: {folder} cannot be made readable by you alone ({error.strerror}), as notes must be;"
            " set HF_DATASETS_CACHE to a folder of your own."
        ) from error
    return folder


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
            header = _csv_header(path, _DELIMITERS[suffix])
            return _cached(path, header, _csv_rows, {"header": header, "delimiter": _DELIMITERS[suffix]})
        names = _json_columns(path)
        return _cached(path, names, _json_rows, {"names": names, "columns": columns})
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _cached(
    path: Path, names: tuple[str, ...], rows: Callable[..., Iterator[Row]], settings: dict[str, object]
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
            fingerprint=fingerprint(VERSION, stamp, sorted(settings.items())),
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, (UserError, UnicodeDecodeError)):
            raise cause from None
        raise


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _csv_records(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
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


def _csv_header(path: Path, delimiter: str) -> tuple[str, ...]:
    _, header = next(_csv_records(str(path), delimiter), (1, []))
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


def _csv_rows(path: str, header: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    records = _csv_records(path, delimiter)
    next(records)
    line = 0
    for line, record in records:
        if len(record) != len(header):
            raise UserError(
                f"data.source: {path}, line {line}: {len(record)} fields where the header has {len(header)}; "
                "put a note that contains the separator or a line break in double quotes."
            )
        yield dict(zip(header, record, strict=True))
    if line == 0:
        raise UserError(f"data.source: {path} has a header and no rows; it needs at least one note.")


# --- JSON and JSONL ---------------------------------------------------------------------------------------------------


def _json_objects(path: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (where it stands, object) for each row of a JSON array, of JSON Lines, or of objects in a row."""
    values = _json_lines(path) if path.lower().endswith(".jsonl") else _json_values(path)
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"data.source: {path}, {where}: expected an object with one note's columns; write {{...}}.")
        yield where, value


def _json_lines(path: str) -> Iterator[tuple[str, object]]:
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


def _json_values(path: str) -> Iterator[tuple[str, object]]:
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
                            f"data.source: {path}, row {number}: the JSON breaks off or is not valid here; "
                            "mend the file or export the table again."
                        ) from None
                    pending, at = pending[at:] + more, 0
            yield f"row {number}", value


def _json_columns(path: Path) -> tuple[str, ...]:
    """Columns of a JSON table: every key of its first objects, in order of appearance."""
    rows = itertools.islice(_json_objects(str(path)), _LOOK_AHEAD)
    names = tuple(dict.fromkeys(name for _, row in rows for name in row if _as_text(name) == name))
    if not names:
        raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
    return names


def _json_rows(path: str, names: tuple[str, ...], columns: Columns) -> Iterator[Row]:
    used = {name for name in (columns.text, columns.label, columns.id or "id") if name is not None}
    for where, row in _json_objects(path):
        for name in used & row.keys():
            value = row[name]
            if isinstance(value, (list, dict)) or (name == columns.text and not isinstance(value, str | None)):
                kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "a number"
                raise UserError(
                    f"data.source: {path}, {where}: column {name!r} holds {kind} where text belongs; "
                    "mend the row or name another column."
                )
        yield {name: _as_text(row.get(name)) for name in names}


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    return whole_characters(value if isinstance(value, str) else json.dumps(value))


# --- Parquet ----------------------------------------------------------------------------------------------------------


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
