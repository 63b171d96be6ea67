"""What a table must be before its rows are used; every fault is one sentence with table, row and cure.

Rows count from 1, header not included. No message repeats a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from medlit.data.settings import Columns
from medlit.data.sources import RawTable
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
_LONGEST_NAME = 40  # characters of a column name


def id_column(table: RawTable, columns: Columns) -> str | None:
    """The column that names a table's notes, or None when their texts' hashes do."""
    return columns.id or ("id" if "id" in table.rows.column_names else None)


def check_columns(table: RawTable, columns: Columns, *, require_labels: bool) -> None:
    """Check that the named columns are there and hold what they should.

    Raises:
        UserError: a column is missing, or holds numbers, lists or nothing where text belongs.
    """
    import pyarrow as pa

    if require_labels and columns.label is None:
        raise UserError("data.columns.label: the labels are needed here; name the column that holds them.")
    names = table.rows.column_names
    needed = {"text_column": columns.text, "id_column": columns.id}
    if require_labels:
        needed["label_column"] = columns.label
    for key, name in needed.items():
        if name is not None and name not in names:
            # A file without a header has note text where the names should stand: long ones are not repeated.
            shown = ", ".join(known if len(known) <= _LONGEST_NAME else "(long text: no header?)" for known in names)
            raise UserError(f"data.{key}: {table.name} has no column {name!r}; its columns are {shown}.")

    used = {"text_column": columns.text, "label_column": columns.label, "id_column": id_column(table, columns)}
    for key, name in used.items():
        if name is None or name not in names:
            continue
        kind = table.rows.features.arrow_schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_null(kind):
            raise UserError(f"data.{key}: column {name!r} of {table.name} is null in every row; name another column.")
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        code = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not text and (key == "text_column" or not code):
            raise UserError(f"data.{key}: column {name!r} of {table.name} holds {kind}, not text; name another column.")


def check_notes(table: RawTable, rows: Dataset, columns: Columns) -> None:
    """Check that no note is empty.

    Args:
        table: the table as read.
        rows: its canonical rows, in the same order.
        columns: names of the table's columns.

    Raises:
        UserError: naming the first empty note.
    """
    import pyarrow.compute as pc

    empty = _places(pc.equal(pc.binary_length(rows.data.column("transcription")), 0))
    _refuse(empty, table, rows, "text_column", columns.text, "the note is empty", "delete such rows or fill them in")


def check_labels(table: RawTable, rows: Dataset, columns: Columns, names: Iterable[str]) -> None:
    """Check that every row has a label and that the labels are of one kind.

    Args:
        table: the table as read.
        rows: its canonical rows, in the same order.
        columns: names of the table's columns.
        names: every label of the source.

    Raises:
        UserError: naming the first row without a label, or with a number among names.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = rows.data.column("specialty")
    cure = "delete such rows or fill them in"
    _refuse(_places(pc.is_null(labels)), table, rows, "label_column", columns.label, "there is no label", cure)
    numbers = sorted(name for name in names if _NUMBER.fullmatch(name))
    words = sorted(name for name in names if name and not _NUMBER.fullmatch(name))
    if numbers and words:
        odd, fault = min((numbers, "a number stands among names"), (words, "a name stands among numbers"), key=_size)
        places = _places(pc.is_in(labels, value_set=pa.array(odd, pa.string())))
        cure = "mend such rows, or say in data.labels what they mean (aliases) or that they go (drop)"
        _refuse(places, table, rows, "label_column", columns.label, fault, cure)


def check_ids(split: str, tables: list[RawTable], parts: list[Dataset], columns: Columns) -> None:
    """Check that the id column names every row of a split, and each by another name.

    Raises:
        UserError: naming the first row without an id, or the two rows that share one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    given = [(table, rows) for table, rows in zip(tables, parts, strict=True) if id_column(table, columns)]
    for table, rows in given:
        ids = rows.data.column("id")
        missing = pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
        cure = "fill it in or name another column"
        _refuse(_places(missing), table, rows, "id_column", id_column(table, columns), "there is no id", cure)
    chunks = [chunk for _, rows in given for chunk in rows.data.column("id").chunks]
    together = pa.chunked_array(chunks, pa.string())
    if pc.count_distinct(together).as_py() == len(together):
        return
    seen: dict[str, str] = {}
    for table, rows in given:
        for place, identity in enumerate(rows["id"][:], start=1):
            where = f"{table.name}, row {place}"
            if identity in seen:
                raise UserError(
                    f"data.columns.id: {where} has the id {identity[:_LONGEST_NAME]!r} of {seen[identity]} (the"
                    f" {split} split); make the ids unique or name another column in data.columns.id."
                )
            seen[identity] = where


def _size(choice: tuple[list[str], str]) -> int:
    return len(choice[0])


def _places(mask: pa.ChunkedArray) -> list[int]:
    """Row numbers, from 0, where a mask is true."""
    import pyarrow.compute as pc

    return [] if pc.any(mask).as_py() is not True else pc.indices_nonzero(mask).to_pylist()


def _refuse(
    places: list[int], table: RawTable, rows: Dataset, key: str, column: str | None, fault: str, cure: str
) -> None:
    if not places:
        return
    if len(places) == len(rows):
        raise UserError(f"data.{key}: column {column!r} of {table.name} is empty in every row; name another column.")
    identity = rows[places[0]]["id"]
    known = "" if identity is None or key == "id_column" else f" (id {identity[:_LONGEST_NAME]})"
    more = f", as in {len(places) - 1} more" if len(places) > 1 else ""
    raise UserError(f"data.{key}: {table.name}, row {places[0] + 1}{known}: {fault}{more}; {cure}.")
