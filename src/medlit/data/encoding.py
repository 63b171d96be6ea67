"""Tell a UTF-8 text file from everything else that carries a `.csv` or `.json` name, and name what it is instead.

Nothing here guesses and goes on: a note decoded in the wrong encoding trains without a complaint and is wrong, so a
table that is not UTF-8 is refused, with the encoding that it seems to have and the command that mends it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TextIO

from medlit.errors import UserError

_HEAD = 1 << 16  # bytes read to judge a file
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG picture",
    b"SQLite": "an SQLite database",
}
_BOMS = {  # UTF-32's begins with UTF-16's, so it is asked first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_EAST = ["shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "cp1251"]
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_LONE_HIGH = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_HIGH = re.compile(rb"[\x80-\xff]")


def open_utf8(path: Path, newline: str) -> TextIO:
    """Open a text table; a byte-order mark is taken off.

    Args:
        path: the file.
        newline: as for `open`: `""` keeps the line ends of quoted fields, and a line feed splits there only.

    Raises:
        UserError: the file's first 64 KiB are not text, or text in UTF-16 or UTF-32.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        raise UserError(
            f"data.source: {path} is {kind}, not a text table; export it as UTF-8 CSV or give it the file suffix of"
            " what it is."
        )
    encoding = _wide_encoding(head)
    if encoding is not None:
        raise _other_encoding(path, encoding, line=1)
    if len(_CONTROL.findall(head)) > len(head) // 10:
        raise _binary(path)
    return path.open(encoding="utf-8-sig", newline=newline)


def not_utf8(path: Path) -> UserError:
    """Explain a file whose bytes do not decode: the first line where they fail, and the encoding that they fit."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # noqa: B007 - used after the loop
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                window = line[max(0, error.start - _HEAD // 2) : error.start + _HEAD // 2] + file.read(_HEAD)
                break
    if len(_CONTROL.findall(window)) > len(window) // 20:
        return _binary(path)
    return _other_encoding(path, _narrow_encoding(window), line=number)


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark or, without one, by the zeros that ASCII letters leave in every second byte."""
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    low, high = head[0::2].count(0), head[1::2].count(0)
    if min(low, high) * 20 < max(low, high) and max(low, high) * 4 > len(head):
        return "UTF-16"
    return None


def _narrow_encoding(window: bytes) -> str:
    """Name of the 8-bit or multi-byte encoding that bytes which are not UTF-8 most likely have."""
    high = len(_HIGH.findall(window))
    # Western text has its accents, dashes and quotes one by one between ASCII letters; other scripts have runs of them.
    if 2 * len(_LONE_HIGH.findall(window)) > high:
        return "Windows-1252" if re.search(rb"[\x80-\x9f]", window) else "ISO-8859-1"
    from charset_normalizer import from_bytes

    best = from_bytes(window, cp_isolation=_EAST).best()
    return "ISO-8859-1" if best is None else best.encoding


def _other_encoding(path: Path, encoding: str, line: int) -> UserError:
    return UserError(
        f"data.source: {path} is not UTF-8 from line {line} on (its encoding looks like {encoding}); convert it, e.g."
        f" `iconv -f {encoding.upper()} -t UTF-8 {path.name} > utf8-{path.name}`."
    )


def _binary(path: Path) -> UserError:
    return UserError(f"data.source: {path} is a binary file, not a text table; export the notes as UTF-8 CSV or JSONL.")
