"""Checks of a table's columns and of the rows in them; no message repeats a note.

Rows in messages count from 1, header not included.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from medlit.data.settings import Columns
from medlit.data.sources import RawTable
from medlit.errors import UserError, tell

_CANONICAL = {"text": "transcription", "label": "specialty", "id": "id"}
_FILL_IN = "delete such rows or fill them in"
_MAX_NAME = 40  # characters of a column name or an id in an error message
_MOST_NAMES = 40  # columns that an error lists: the keys of a JSON table may name patients
_CHAT = "a chat table: write the user's and the assistant's turns to two columns, and name these in data.columns"
# Columns by which the table of another tool is known -> how to read it.
_KNOWN_TABLES = {
    frozenset({"instruction", "output"}): "an Alpaca table: set data.columns.text to 'input' (or 'instruction', where"
    " the notes are there) and data.columns.label to 'output'",
    frozenset({"messages"}): _CHAT,
    frozenset({"conversations"}): _CHAT,
}
_TEXTS = {"string", "large_string", "string_view", "null"}  # as `datasets` names the types
_CODES = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def check_columns(table: RawTable, columns: Columns, require_labels: bool) -> None:
    """Raise a UserError if a named column does not exist, is named twice, or holds no text where text belongs."""
    if require_labels and columns.label is None:
        raise UserError("data.columns.label: the labels are needed here; name the column that holds them.")
    names, chosen = table.rows.column_names, columns.of(table.rows.column_names)
    for key, name in chosen.items():
        if name is None or (key == "label" and name not in names and not require_labels):
            continue
        if name not in names:
            # A file without a header has note text in place of the names: long ones are not repeated.
            listed = [known if len(known) <= _MAX_NAME else "(long text: no header?)" for known in names[:_MOST_NAMES]]
            shown = ", ".join(listed) + (f" and {len(names) - len(listed)} more" if len(names) > len(listed) else "")
            advice = next((f"; this is {text}" for found, text in _KNOWN_TABLES.items() if found <= set(names)), "")
            raise UserError(
                f"data.columns.{key}: {table.name} has no column {name!r}; name the {_CANONICAL[key]}'s column with"
                f" --data.columns.{key} (its columns are {shown}){advice}."
            )
        if (first := next(other for other, same in chosen.items() if same == name)) != key:
            raise UserError(columns.unfit(key, table.name, f"is that of data.columns.{first}"))
        feature = table.rows.features[name]
        value = getattr(feature, "feature", feature) if key == "label" else feature  # of a list of labels
        may_be_codes = key != "text" and (value is feature or table.classes(name) is not None)
        if getattr(value, "dtype", None) not in (_TEXTS | _CODES if may_be_codes else _TEXTS):
            kind = table.rows.features.arrow_schema.field(name).type
            raise UserError(columns.unfit(key, table.name, f"holds {kind}, not text"))


def check_rows(table: RawTable, rows: Dataset, columns: Columns, names: set[str] | None) -> None:
    """Raise a UserError for a row without a note or, given all labels' `names`, for a missing or doubtful label."""
    empty = pc.equal(pc.binary_length(rows.data.column("transcription")), 0)
    _refuse_rows(empty, table, rows, columns, "text", "the note is empty", _FILL_IN)
    if names is None:
        return
    missing = pc.is_null(rows.data.column("specialty"))
    _refuse_rows(missing, table, rows, columns, "label", "there is no label", _FILL_IN)
    numbers = sorted(name for name in names if _NUMBER.fullmatch(name))
    words = sorted(names - set(numbers))
    if numbers and words:
        choices = [(numbers, "it is a number among names"), (words, "it is a name among numbers")]
        rarer, fault = min(choices, key=lambda choice: len(choice[0]))
        remedy = "correct such rows, or say in data.labels what they mean (aliases) or leave them out (drop)"
        mask = pa.chunked_array([[bool({*names} & {*rarer}) for names in rows["specialties"][:]]], pa.bool_())
        _refuse_rows(mask, table, rows, columns, "label", fault, remedy)


def check_ids(tables: list[RawTable], parts: list[Dataset], columns: Columns, join_ids: bool) -> None:
    """Raise a UserError unless the id column names every row of a split; refuse or report repeated ids."""
    given = [pair for pair in zip(tables, parts, strict=True) if columns.of(pair[0].rows.column_names)["id"]]
    if join_ids and 0 < len(given) < len(tables):
        bare = next(table.name for table in tables if columns.of(table.rows.column_names)["id"] is None)
        raise UserError(
            f"data.columns.id: {given[0][0].name} has ids and {bare} has no column 'id', so that answers could not be"
            " joined with both; rename its column, or set 'none' for hashes of the texts."
        )
    for table, rows in given:
        remedy = "fill it in, name another column, or set data.columns.id to 'none' for hashes of the texts"
        missing = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(rows.data.column("id")), ""), True)
        _refuse_rows(missing, table, rows, columns, "id", "there is no id", remedy)
    chunks = [chunk for _, rows in given for chunk in rows.data.column("id").chunks]
    if pc.count_distinct(pa.chunked_array(chunks, pa.string())).as_py() == sum(len(rows) for _, rows in given):
        return
    places = (f"{table.name}, row {number}" for table, rows in given for number in range(1, len(rows) + 1))
    first: dict[str, str] = {}
    for identity, place in zip((each for _, rows in given for each in rows["id"][:]), places, strict=True):
        if first.setdefault(identity, place) is not place:
            fault = f"{place} has the id {identity[:_MAX_NAME]!r} of {first[identity]}"
            if join_ids:
                raise UserError(
                    f"data.columns.id: {fault}, so that answers could not be joined with the table; make the ids"
                    " unique, name another column, or set 'none' for hashes of the texts, in the table's order."
                )
            tell(f"data.columns.id: {fault}; such ids get a hash of their texts as a suffix")
            return


def _refuse_rows(
    mask: pa.ChunkedArray, table: RawTable, rows: Dataset, columns: Columns, key: str, fault: str, remedy: str
) -> None:
    """Raise a UserError that names the first canonical row where `mask` is true, if there is one."""
    places = pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()
    if not places:
        return
    first = rows[places[0]]
    if len(places) == len(rows) and not first[_CANONICAL[key]]:
        raise UserError(columns.unfit(key, table.name, "is empty in every row"))
    identity = first["id"]
    named = "" if identity is None or key == "id" else f" (id {identity[:_MAX_NAME]})"
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    raise UserError(f"data.columns.{key}: {table.name}, row {places[0] + 1}{named}{more}: {fault}; {remedy}.")
