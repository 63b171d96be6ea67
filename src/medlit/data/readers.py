"""One file of notes -> a memory-mapped table of its columns, as they are in the file.

CSV, TSV, JSON and JSONL, compressed or not, are parsed record by record (`text_files.py`), every value as text, and
`datasets` writes them to its Arrow cache once. Excel workbooks are read in the same way, Parquet by `datasets`.
READERS, at the end of this file, names the formats.
"""

import glob
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from medlit.data.cache import Names, cache_folder, cached_table
from medlit.data.prompt import whole_characters
from medlit.data.settings import Columns
from medlit.data.text_files import UNPACK, UNPACK_ERRORS, csv_records, json_objects, not_utf8, open_bytes
from medlit.errors import UserError

Row = dict[str, str | list[str | None] | None]

MAX_WORKBOOK = 1 << 30  # bytes that an Excel workbook may unpack to: its texts are held in memory
_EXCEL_AS_IT_IS: dict[str, Any] = {"header": None, "dtype": object, "na_filter": False, "engine": "openpyxl"}
MAX_KEYS = 1_000  # of a JSON table: one with more has values for keys, and a column for each would fill the disk
_EDGE = '\ufeff" \t'
_JSON_KINDS = {list: "a list", dict: "an object", bool: "true or false"}


def read_file(path: Path, columns: Columns) -> Dataset:
    """Read one table, the second time from the Arrow cache; a UserError names the line or row at fault."""
    suffix = table_name(path)[1]
    if not suffix:
        raise UserError(f"data.source: {path} has a format that medlit does not read; use one of {KINDS}.")
    try:
        return READERS[suffix](path, columns)
    except PermissionError:
        raise UserError(f"data.source: {path} may not be read; change its permissions.") from None
    except UnicodeDecodeError:
        with open_bytes(path) as file:
            raise not_utf8(file, path) from None
    except UNPACK_ERRORS as error:
        if path.suffix.lower() not in UNPACK or getattr(error, "errno", None) is not None:
            raise
        raise _damaged(path, f"{path.suffix.lower()} file") from error


def table_name(path: Path) -> tuple[str, str]:
    """A table's name without its suffixes, and the suffix of its format, '' if no reader has it."""
    packed = path.suffix.lower() in UNPACK
    bare = path.with_suffix("") if packed else path
    suffix = bare.suffix.lower()
    return bare.stem, suffix if suffix in (_TEXT_READERS if packed else READERS) else ""


def _read_csv(path: Path, _: Columns, delimiter: str) -> Dataset:
    line, header = next(csv_records(str(path), delimiter), (1, []))
    if not header:
        raise UserError(f"data.source: {path} is empty; it needs a header and at least one note.")
    names = _column_names(header, f"{path}, line {line}")
    other = next((mark for mark in (",", "\t", ";", "|") if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        expected = "tabs" if delimiter == "\t" else "commas"
        raise UserError(
            f"data.source: {path}, line {line}: the header is not separated by {expected} but seems to be by"
            f" {other!r}; save the table with {expected} or as .xlsx" + (", or name it .tsv." if other == "\t" else ".")
        )
    return cached_table(path, names, csv_rows, header=names, delimiter=delimiter)


def _read_json(path: Path, columns: Columns, by_line: bool) -> Dataset:
    found = cached_table(path, ("name", "kind"), json_columns, by_line=by_line)
    names = tuple(found["name"][:])
    lists = tuple(row["name"] for row in found if row["name"] == columns.label and row["kind"] == "list")
    return cached_table(path, names, json_rows, lists, names=names, columns=columns, by_line=by_line)


def csv_rows(path: str, header: Names, delimiter: str) -> Iterator[Row]:
    """Yield column -> value of each record after the header."""
    records = csv_records(path, delimiter)
    first, names = next(records)
    line = first
    for line, record in records:
        if _is_repeated(names, record):
            raise UserError(f"data.source: {path}, line {line}: the header is repeated here; delete such lines.")
        if len(record) != len(header):
            raise UserError(
                f"data.source: {path}, line {line}: {len(record)} fields where the header has {len(header)}; put a"
                " note with the separator or a line break in double quotes, or export a file again that is cut off."
            )
        yield dict(zip(header, record, strict=True))
    if line == first:
        raise UserError(f"data.source: {path} has a header and no rows; it needs at least one note.")


def _is_repeated(header: list[str], row: list[str]) -> bool:
    """Whether a row is the header again, as in joined files, whatever its spaces, quotes and byte-order mark."""
    return len(row) == len(header) and all(a.strip(_EDGE) == b.strip(_EDGE) for a, b in zip(row, header, strict=True))


def json_columns(path: str, by_line: bool) -> Iterator[dict[str, str]]:
    """Yield each name that any object has, and the type of its first value that is not null."""
    kinds: dict[str, str] = {}
    for _, row in json_objects(path, by_line):
        kinds |= {name: type(row[name]).__name__ for name in row if kinds.get(name) in (None, "NoneType")}
        if len(kinds) > MAX_KEYS:
            raise UserError(f"data.source: {path} has over {MAX_KEYS:,} different keys; give all its objects the same.")
    if not kinds:
        raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
    yield from ({"name": name, "kind": kind} for name, kind in kinds.items())


def json_rows(path: str, names: Names, columns: Columns, by_line: bool, lists: Names = ()) -> Iterator[Row]:
    """Yield column -> text of each object, a list of texts in `lists`; what is missing, NaN or Infinity is null."""
    used = {*columns.of(names).values()}
    for place, row in json_objects(path, by_line):
        for name in row.keys() & used:
            value, is_list = row[name], name in lists
            of_texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
            is_scalar = isinstance(value, str) or not (name == columns.text or isinstance(value, (list, dict)))
            if value is not None and not (of_texts if is_list else is_scalar):
                kind = "a text" if isinstance(value, str) else _JSON_KINDS.get(type(value), "a number")
                belongs = "a list of texts" if is_list else "text"
                fault = f"column {name!r} holds {kind} where {belongs} belongs"
                raise UserError(f"data.source: {path}, {place}: {fault}; correct the row or name another column.")
        yield {name: _json_text(row.get(name), name in lists) for name in names}


def _json_text(value: Any, is_list: bool = False) -> Any:  # noqa: ANN401 - a text, or a list of these
    if is_list or value is None:
        return value and [whole_characters(each) for each in value]
    return whole_characters(value if isinstance(value, str) else json.dumps(value))


def _read_parquet(path: Path, columns: Columns) -> Dataset:
    """Read the columns that are used, and those others that `datasets` has a type for."""

    def has_type(field: pa.Field) -> bool:
        try:
            return bool(Features.from_arrow_schema(pa.schema([field])))
        except ValueError:  # UUIDs, maps, list views, binary values of a fixed size
            return False

    try:
        schema = pq.read_schema(path)
        names = dict(zip(_column_names(schema.names, str(path)), schema.names, strict=True))
        kept = pa.schema([field for field in schema if has_type(field)], schema.metadata)
        for key, name in columns.of(names).items():
            if name in names and names[name] not in kept.names:
                raise UserError(columns.unfit(key, str(path), f"holds {schema.field(names[name]).type}, not text"))
        if pq.read_metadata(path).num_rows == 0:
            raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
        features = Features.from_arrow_schema(kept)
        pattern = glob.escape(str(path))  # else `notes[1].parquet` would mean `notes1.parquet`
        rows = Dataset.from_parquet(pattern, cache_dir=str(cache_folder()), columns=kept.names, features=features)
        return rows.rename_columns({written: name for name, written in names.items() if written in kept.names})
    except (pa.ArrowException, OSError, DatasetGenerationError):
        raise _damaged(path, "Parquet file") from None


def _read_excel(path: Path, columns: Columns) -> Dataset:
    """Read a workbook's sheet of notes: the only one with rows, or of several the one with the column of the text."""
    try:
        with zipfile.ZipFile(path) as book:
            size = sum(part.file_size for part in book.infolist())
        if size > MAX_WORKBOOK:
            raise UserError(f"data.source: {path} unpacks to {size >> 20:,} MiB; save such a table as CSV.")
        first = pd.read_excel(path, sheet_name=None, nrows=1, **_EXCEL_AS_IT_IS)
        heads = {str(sheet): row for sheet, rows in first.items() for row in _excel_texts(rows) if any(row)}
        sheets = [sheet for sheet, head in heads.items() if columns.text in map(str.strip, head)] or list(heads)
        if len(sheets) != 1:
            fault = f"several sheets of rows ({', '.join(sheets)})" if sheets else "no sheet that begins with a header"
            raise UserError(f"data.source: {path} has {fault}; save the notes as the one sheet of a workbook.")
        head = heads[sheets[0]]
        while head and not head[-1]:  # pandas makes all rows as long as the longest
            head.pop()
        header = _column_names(head, f"{path}, sheet {sheets[0]}, row 1")
        return cached_table(path, header, excel_rows, header=header, sheet=sheets[0])
    except (UserError, PermissionError):
        raise
    except ImportError:
        raise UserError(f"data.source: {path} cannot be read without openpyxl; run `pip install openpyxl`.") from None
    except Exception as error:  # a damaged workbook fails in zipfile, XML or openpyxl, each with its own classes
        raise _damaged(path, "Excel workbook") from error


def excel_rows(path: str, header: Names, sheet: str) -> Iterator[Row]:
    """Yield column -> text of each row after the header that is not blank."""
    rows = _excel_texts(pd.read_excel(path, sheet_name=sheet, **_EXCEL_AS_IT_IS))
    (_, head), *filled = [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
    if not filled:
        raise UserError(f"data.source: {path} has a header and no rows; it needs at least one note.")
    for number, row in filled:
        if any(row[len(header) :]):
            raise UserError(f"data.source: {path}, row {number}: a cell is in a column without a name; name it.")
        if _is_repeated(head, row):
            raise UserError(f"data.source: {path}, row {number}: the header is repeated here; delete such rows.")
        yield dict(zip(header, row, strict=False))


def _excel_texts(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the text of each row's cells; that of an error, such as #N/A, which pandas reads as NaN, is a space."""
    from openpyxl.utils.escape import unescape  # pandas imports it for a workbook, too

    for row in rows.itertuples(index=False, name=None):
        texts = (" " if value != value else str(value) for value in row)
        yield [whole_characters(unescape(text)) for text in texts]  # a carriage return in a cell is _x000D_


def _damaged(path: Path, kind: str) -> UserError:
    """The error for a file that is not what its suffix says."""
    return UserError(f"data.source: {path} is not a whole {kind} (cut short, or another format); export it again.")


def _column_names(header: Sequence[str], where: str) -> Names:
    """Names of all columns, none of them repeated; one without a name is called after its place."""
    names = tuple(name.strip() or f"column_{place}" for place, name in enumerate(header, start=1))
    repeated = next((name for name, times in Counter(names).items() if times > 1), None)
    if repeated is not None:
        raise UserError(f"data.source: {where}: two columns are called {repeated[:40]!r}; rename one.")
    return names


# Suffix -> reads such a file. A format is named here and nowhere else.
_TEXT_READERS: dict[str, Callable[[Path, Columns], Dataset]] = {
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": partial(_read_json, by_line=False),
    ".jsonl": partial(_read_json, by_line=True),
}
READERS = _TEXT_READERS | {".parquet": _read_parquet, ".xlsx": _read_excel}
KINDS = f"{', '.join(READERS)}; {', '.join(_TEXT_READERS)} also with {', '.join(UNPACK)}"  # for messages
