"""The parts that a table of predictions grows in: a file of JSON lines for each process, beside the table.

Line 1 is the run's origin, every other one an answer with its place in the table (`row`). Lines are handed to the
system batch by batch, so a process that is killed loses no more than the batch it was at. Of a part that ends in half a
line, or is damaged further up, what stands before counts and the rest is dropped. A run that goes on may have more
processes than the one before, or fewer: each reads every part that lies there and adds to its own.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from medlit.predictions.resume_key import Origin

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A part as it was found.

    Attributes:
        path: the file.
        origin: of the run that wrote it; None when it broke off before it had said so.
        rows: places of the answered notes in their table, in the order of the file, (n,).
        offsets: bytes before each of their lines, (n,).
        end: bytes up to the end of the last whole line; 0 without an origin.
    """

    path: Path
    origin: Origin | None
    rows: IntArray
    offsets: IntArray
    end: int


def part_path(table: Path, rank: int) -> Path:
    """The part of one process."""
    return table.with_name(f".{table.name}.part{rank}")


def find_parts(table: Path) -> list[Path]:
    """The parts that lie beside a table, whoever left them."""
    name = re.compile(re.escape(part_path(table, 0).name.removesuffix("0")) + r"\d+")
    return sorted(path for path in table.parent.glob(".*.part*") if name.fullmatch(path.name))


def read_part(path: Path) -> Part:
    """See what a part holds; memory grows by 16 bytes an answer."""
    lines = _whole_lines(path)
    first = next(lines, None)
    origin = None if first is None else Origin.from_dict(first[1])
    rows, offsets = array("q"), array("q")
    end = first[2] if first is not None and origin is not None else 0
    for start, value, stop in lines if origin is not None else ():
        if not isinstance(value.get("row"), int):
            break
        rows.append(value["row"])
        offsets.append(start)
        end = stop
    return Part(path, origin, np.frombuffer(rows, dtype=np.int64), np.frombuffer(offsets, dtype=np.int64), end)


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield (bytes before it, object, bytes up to its end) for each line until one is not whole."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(value, dict):
                return
            yield start, value, start + len(line)
            start += len(line)


def answered(parts: Sequence[Part], notes: int) -> npt.NDArray[np.bool_]:
    """Whether each of a table's notes stands in a part, (notes,)."""
    found = np.zeros(notes, dtype=np.bool_)
    for part in parts:
        found[part.rows] = True
    return found


class PartFile:
    """A part that is being written, readable by its owner alone.

    Args:
        path: the file.
        origin: of this run.
        keep: bytes of what an interrupted run left in it; 0 begins anew.
    """

    def __init__(self, path: Path, origin: Origin, keep: int) -> None:
        self.path = path
        if keep:
            self._file: BinaryIO = path.open("r+b")
            self._file.truncate(keep)
            self._file.seek(keep)
        else:
            path.unlink(missing_ok=True)
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            self.add([origin.to_dict()])
        self.empty = keep == 0

    def add(self, values: Iterable[dict[str, Any]]) -> None:
        """Add lines, and hand them to the system."""
        self._file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
        self._file.flush()
        self.empty = False

    def close(self) -> None:
        """Write no more."""
        self._file.close()
