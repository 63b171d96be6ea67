"""The records of CSV and JSON files, compressed or not, each with the line or row where it begins.

The CSV readers of pandas and `datasets` fill short rows silently, count records instead of lines, and guess types, so
that an id `007` becomes 7. A note decoded wrongly trains without a complaint, so a file that is not UTF-8 is refused,
with the command that converts it.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from charset_normalizer import from_bytes

from medlit.data.prompt import whole_characters
from medlit.errors import UserError

MAX_OBJECT = 1 << 26  # characters in one line
MAX_TEXT = 1 << 30  # characters of a `.json` file, which is held in memory
_MAX_FIELD = 1 << 24  # characters; a longer CSV field is a quote that was never closed
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?\s*', re.IGNORECASE)  # a line before the header, for Excel
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # two values of JSON
_HEAD = 1 << 16  # bytes read to judge a file
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_HIGH = re.compile(rb"[\x80-\xff]")
_LONE_HIGH = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_NON_LATIN = ["shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "cp1251"]


def decode_note(content: bytes) -> str:
    """The text of one note, with the checks that the text of a file gets."""
    name = "the standard input"
    _check_head(content[:_HEAD], name)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(io.BytesIO(content), name) from None


def csv_records(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which the record begins, its fields); blank lines are skipped."""
    csv.field_size_limit(_MAX_FIELD)
    with _open_utf8(Path(path), newline="") as file:
        lines = _lines(file, path)
        first = next(lines, "")
        if mark := _SEPARATOR.fullmatch(first):
            delimiter, first = mark[1], "\n"
        reader, line = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True), 1
        try:
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
        except csv.Error:  # without the parser's own message, which may quote the note
            raise UserError(
                f"data.source: {path}, line {line}: a quoted field that begins here is not closed, or has a quote "
                'inside it that is not doubled; write a quote inside a note as "".'
            ) from None


def _object(pairs: list[tuple[str, object]]) -> object:
    """An object, its keys stripped; or its pairs where a key is repeated, of which `json` silently keeps the last."""
    values = {whole_characters(key).strip(): value for key, value in pairs}
    return values if len(values) == len(pairs) else pairs


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)  # pandas writes NaN for no value


def json_objects(path: str, by_line: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (its place, object) for each row of JSON Lines, or of a JSON array or concatenated objects."""
    for place, value in _json_lines(path) if by_line else _json_values(path):
        if not isinstance(value, dict):
            fault = "expected an object with one note's columns; write {...}"
            if isinstance(value, list) and value and isinstance(value[0], tuple):
                fault = "two columns have the same name; rename one"
            raise UserError(f"data.source: {path}, {place}: {fault}.")
        yield place, value


def _json_lines(path: str) -> Iterator[tuple[str, object]]:
    with _open_utf8(Path(path), newline="\n") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                try:
                    value = _DECODER.decode(line)
                except (ValueError, RecursionError):
                    raise _invalid_json(path, f"line {number}") from None
                yield f"line {number}", value


def _json_values(path: str) -> Iterator[tuple[str, object]]:
    """Decode the values of a `.json` file one by one: those of its array, or one after another."""
    with _open_utf8(Path(path), newline="") as file:
        text = file.read(MAX_TEXT).strip()
        if file.read(1):
            raise UserError(f"data.source: {path} is over {MAX_TEXT >> 20} million characters; save it as JSON Lines.")
    is_array = text.startswith("[")
    at, end = int(is_array), len(text) - (is_array and text.endswith("]"))
    for number in itertools.count(1):
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        try:
            if at == end and text[end:] == "]" * is_array:
                return
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise _invalid_json(path, f"row {number}") from None
        yield f"row {number}", value


def _invalid_json(path: str, place: str) -> UserError:
    return UserError(f"data.source: {path}, {place}: not valid JSON, or is cut off here; correct or export it again.")


def _lines(file: IO[str], path: str) -> Iterator[str]:
    """Yield the lines of a text; unlimited, one that never ends, as a small archive may hold, would fill the memory."""
    for number, line in enumerate(iter(partial(file.readline, MAX_OBJECT), ""), start=1):
        if len(line) == MAX_OBJECT:
            raise UserError(
                f"data.source: {path}, line {number}: the line is over {MAX_OBJECT >> 20} million characters long;"
                " export the table again with one row on each line."
            )
        yield line


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file; a compressed one is decompressed while it is read."""
    open_packed = UNPACK.get(path.suffix.lower())
    file: IO[bytes] = path.open("rb") if open_packed is None else open_packed(path)
    return file


def _open_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    files = [file for file in archive.infolist() if not file.is_dir() and not file.filename.startswith("__MACOSX/")]
    if len(files) != 1 or files[0].flag_bits & 1:
        fault = f"{len(files)} files" if len(files) != 1 else "an encrypted file"
        raise UserError(f"data.source: {path} holds {fault}; pack one table, without a password.")
    return archive.open(files[0])


def _open_utf8(path: Path, newline: str) -> IO[str]:
    """Open a text table, unless its first 64 KiB are not text, or text in UTF-16; a byte-order mark is skipped."""
    with open_bytes(path) as file:
        _check_head(file.read(_HEAD), path)
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def _check_head(head: bytes, path: Path | str) -> None:
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        raise UserError(f"data.source: {path} is {kind}, not a text table; export UTF-8 CSV or correct its suffix.")
    # UTF-16 by its byte-order mark, or by the zeros that ASCII letters leave in every second byte.
    even, odd = head[0::2].count(0), head[1::2].count(0)
    zeros = min(even, odd) * 20 < max(even, odd) and max(even, odd) * 4 > len(head)
    if zeros or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _other_encoding(path, "UTF-16", line=1)
    if len(_CONTROL.findall(head)) > len(head) // 10:
        raise _binary(path)


def not_utf8(file: IO[bytes], path: Path | str) -> UserError:
    """The error for bytes that do not decode: names the first such line, and the encoding that its bytes fit."""
    for number in itertools.count(1):  # noqa: B007 - used after the loop
        line = file.readline(4 * MAX_OBJECT)
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            window = line[max(0, error.start - _HEAD // 2) : error.start + _HEAD // 2] + file.read(_HEAD)
            break
    if len(_CONTROL.findall(window)) > len(window) // 20:
        return _binary(path)
    # Western text has its accents, dashes and quotes one by one between ASCII letters; other scripts have runs of them.
    encoding = "Windows-1252" if re.search(rb"[\x80-\x9f]", window) else "ISO-8859-1"
    if 2 * len(_LONE_HIGH.findall(window)) <= len(_HIGH.findall(window)):
        best = from_bytes(window, cp_isolation=_NON_LATIN).best()
        encoding = "ISO-8859-1" if best is None else best.encoding
    return _other_encoding(path, encoding, line=number)


def _other_encoding(path: Path | str, encoding: str, line: int) -> UserError:
    files = ""
    if isinstance(path, Path) and path.suffix.lower() not in UNPACK:
        files = f" '{path}' > 'utf8-{path.name}'"
    return UserError(
        f"data.source: {path} is not UTF-8 from line {line} on (its encoding looks like {encoding}); convert it, e.g."
        f" `iconv -f {encoding.upper()} -t UTF-8{files}`."
    )


def _binary(path: Path | str) -> UserError:
    return UserError(f"data.source: {path} is a binary file, not a text table; export the notes as UTF-8 CSV or JSONL.")


# Second suffix of a compressed text table -> opens such a file, decompressed.
UNPACK: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: io.BufferedReader(import_module("pyarrow").CompressedInputStream(str(path), "zstd")),
    ".zip": _open_zip,
}
# What reading a damaged one raises; NotImplementedError: a compression of ZIP that Python lacks.
UNPACK_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
