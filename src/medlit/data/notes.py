"""From any source, or a typed note, to the four columns that everything else works with.

    id             text    the id column, or the first 16 digits of `text_hash`, with `-2`, `-3` ... for repeats
    transcription  text    the note; line ends are line feeds, outer white space is removed, the rest is unchanged
    specialty      text    one spelling for each label (aliases applied, else the most frequent one); null: no label
    text_hash      text    32 digits of the BLAKE2b hash of the note with its white space collapsed

No other column passes this file: anything else in a table, such as the public dataset's `keywords`, ends here. Notes
with the same `text_hash` are the same text. Rows in error messages count from 1, header not included; no message
repeats a note.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from medlit.data.cache import cache_folder, cache_key, iter_column
from medlit.data.labels import DROPPED, canonical_spellings, check_label_column, normalise_text
from medlit.data.prompt import whole_characters
from medlit.data.settings import Columns, Labels, Predict
from medlit.data.sources import RawTable, as_text, read_tables
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

VERSION = 1  # part of the cache's key: raise it when the same table would become different rows
CANONICAL = ("id", "transcription", "specialty", "text_hash")

_ID_DIGITS = 16
_MAX_NAME = 40  # characters of a column name or an id in an error message
_FILL_IN = "delete such rows or fill them in"
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def load_source(
    source: str,
    *,
    revision: str | None = None,
    columns: Columns,
    labels: Labels,
    require_labels: bool = True,  # False accepts rows or a table without labels (null), and drops no row
    check_rows: bool = True,  # False keeps empty notes and, as a null, missing labels; the audit counts them
) -> dict[str, Dataset]:
    """Read a source into canonical columns, cached: the second start maps the same files into memory.

    Returns:
        Split name (`train`, `validation`, `test`; `all` for a source without splits) -> its notes, in source order.

    Raises:
        UserError: the source cannot be read, a column is missing or of a wrong type, a note is empty, a label is
            missing, or an id is repeated.
    """
    import pyarrow.compute as pc
    from datasets import concatenate_datasets

    tables = read_tables(source, revision, columns)
    counts = Counter[str]()
    for table in (table for parts in tables.values() for table in parts):
        _check_columns(table, columns, require_labels)
        counts.update(_label_counts(table, columns.label))
    spellings = canonical_spellings(counts, labels if require_labels else Labels(aliases=labels.aliases))

    result: dict[str, Dataset] = {}
    for split, parts in tables.items():
        canonical = [_canonical(table, columns, spellings) for table in parts]
        _check_ids(split, parts, canonical, columns)
        for table, rows in zip(parts, canonical, strict=True):
            if check_rows:
                empty = pc.equal(pc.binary_length(rows.data.column("transcription")), 0)
                _refuse_rows(empty, table, rows, "text", columns.text, "the note is empty", _FILL_IN)
            if check_rows and require_labels:
                _check_labels(table, rows, columns, {name for name in spellings.values() if name})
        result[split] = concatenate_datasets([_without_dropped(rows) for rows in canonical])
        if len(result[split]) == 0:
            raise UserError(f"data.labels: drop and min_count leave no row of {parts[0].name}; loosen them.")
    return _with_ids(result)


def id_column(table: RawTable, columns: Columns) -> str | None:
    """The column that names a table's notes, or None if their texts' hashes do."""
    return columns.id or ("id" if "id" in table.rows.column_names else None)


def read_predict_notes(predict: Predict, columns: Columns, labels: Labels) -> Dataset:
    """Read the notes of `medlit predict` that are in no split: one typed note, or a source of their own.

    Raises:
        UserError: the note is empty, or the source cannot be read.
    """
    import datasets

    if predict.text is None:
        try:
            tables = load_source(predict.source, columns=columns, labels=labels, require_labels=False)
        except UserError as error:
            raise UserError(str(error).replace("data.source", "data.predict.source", 1)) from error
        return datasets.concatenate_datasets(list(tables.values()))
    try:
        text = clean_note(sys.stdin.read() if predict.text == "-" else predict.text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.predict.text: the standard input is not {error.encoding.upper()}; convert it, for example with"
            " iconv."
        ) from None
    if not text:
        raise UserError("data.predict.text: the note is empty; give its text, or '-' and the text on standard input.")
    return datasets.Dataset.from_dict({"id": ["text"], "transcription": [text], "specialty": [None]})


def clean_note(note: str | None) -> str:
    """A note as every later step sees it: whole characters, line feeds for line ends, no outer white space."""
    return "" if note is None else whole_characters(note).replace("\r\n", "\n").replace("\r", "\n").strip()


def hash_text(text: str) -> str:
    """32 hexadecimal digits, the same for two notes that differ in white space only."""
    return hashlib.blake2b(normalise_text(text).encode(), digest_size=16).hexdigest()


def _label_counts(table: RawTable, label: str | None) -> Counter[str]:
    """Rows of each label as the table writes it."""
    import pyarrow.compute as pc

    counts = Counter[str]()
    if label is None or label not in table.rows.column_names:
        return counts
    for batch in table.rows.select_columns([label]).with_format("arrow").iter(batch_size=10_000):
        values, numbers = pc.value_counts(batch.column(0)).flatten()
        for name, number in zip(as_text(values.to_pylist(), table.classes(label)), numbers.to_pylist(), strict=True):
            counts[name or ""] += number
        check_label_column(counts, f"data.columns.label: column {label!r} of {table.name}")
    return counts


def _canonical(table: RawTable, columns: Columns, spellings: dict[str, str | None]) -> Dataset:
    """The canonical columns of one table, row for row; a dropped label is `DROPPED` until `_without_dropped`."""
    import datasets

    rows = table.rows
    label = columns.label if columns.label in rows.column_names else None
    identity = id_column(table, columns)
    key = cache_key(VERSION, rows._fingerprint, columns, label, identity, sorted(spellings.items()))
    chosen = [name for name in dict.fromkeys((columns.text, label, identity)) if name is not None]
    as_arrow = rows.select_columns(chosen).with_format("arrow")
    try:
        mapped = as_arrow.map(
            _canonical_batch,
            batched=True,
            fn_kwargs={
                "notes": iter_column(rows, columns.text),
                "label": label,
                "identity": identity,
                "classes": None if label is None else table.classes(label),
                "spellings": spellings,
            },
            remove_columns=chosen,
            features=datasets.Features({name: datasets.Value("string") for name in CANONICAL}),
            # An explicit name: the folder of a table that was saved to disk may not be writable.
            cache_file_name=str(cache_folder() / f"{key}.arrow"),
            new_fingerprint=key,
            desc="Reading notes",
        )
    except UnicodeDecodeError:  # Arrow and Parquet files may hold any bytes as text
        raise UserError(
            f"data.source: {table.name} has text that is not UTF-8; read it in its own encoding and export it again."
        ) from None
    return mapped.with_format(None)


def _canonical_batch(
    batch: pa.Table,
    notes: Iterator[str | None],
    label: str | None,
    identity: str | None,
    classes: list[str] | None,
    spellings: dict[str, str | None],
) -> pa.Table:
    """Canonical rows of a batch; its notes are the next of `notes`, so the mapped ones are never read."""
    import pyarrow as pa

    def text_of(column: str | None, classes: list[str] | None) -> list[str | None]:
        return [None] * len(batch) if column is None else as_text(batch.column(column).to_pylist(), classes)

    cleaned = [clean_note(note) for note in islice(notes, len(batch))]
    specialties = [spellings[name or ""] for name in text_of(label, classes)]
    columns = (text_of(identity, None), cleaned, specialties, [hash_text(note) for note in cleaned])
    schema = pa.schema([(name, pa.string()) for name in CANONICAL])
    return pa.table(dict(zip(CANONICAL, columns, strict=True)), schema=schema)


def _without_dropped(rows: Dataset) -> Dataset:
    import pyarrow.compute as pc

    kept = pc.fill_null(pc.not_equal(rows.data.column("specialty"), DROPPED), True).to_numpy()
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def _with_ids(tables: dict[str, Dataset]) -> dict[str, Dataset]:
    """Name the notes of tables without an id column by their text; repeats are numbered across splits."""
    seen = Counter[str]()
    result = dict(tables)
    for split, rows in tables.items():
        given = rows.data.column("id") if rows._indices is None else rows.with_format("arrow")[:]["id"]
        if given.null_count == 0:
            continue
        ids = []
        for identity, text_hash in zip(rows["id"][:], rows["text_hash"][:], strict=True):
            stem = identity or text_hash[:_ID_DIGITS]
            if identity is None:
                seen[stem] += 1
            ids.append(stem if identity or seen[stem] == 1 else f"{stem}-{seen[stem]}")
        key = cache_key(VERSION, "ids", rows._fingerprint, hashlib.blake2b("\n".join(ids).encode()).hexdigest())
        result[split] = rows.remove_columns("id").add_column("id", ids, new_fingerprint=key).select_columns(CANONICAL)
    return result


def _check_columns(table: RawTable, columns: Columns, require_labels: bool) -> None:
    """Check that the named columns exist and hold text, where text belongs."""
    import pyarrow as pa

    if require_labels and columns.label is None:
        raise UserError("data.columns.label: the labels are needed here; name the column that holds them.")
    names = table.rows.column_names
    used = {"text": columns.text, "label": columns.label, "id": id_column(table, columns)}
    for key, name in used.items():
        if name is None or (key == "label" and name not in names and not require_labels):
            continue
        if name not in names:
            # A file without a header has note text in place of the names: long ones are not repeated.
            shown = ", ".join(known if len(known) <= _MAX_NAME else "(long text: no header?)" for known in names)
            whose = {"text": "note", "label": "specialty", "id": "id"}[key]
            raise UserError(
                f"data.columns.{key}: {table.name} has no column {name!r}; name the {whose}'s column with"
                f" --data.columns.{key} (its columns are {shown})."
            )
        kind = table.rows.features.arrow_schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_null(kind):
            raise UserError(
                f"data.columns.{key}: column {name!r} of {table.name} is null in every row; name another column."
            )
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        is_code = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not is_text and (key == "text" or not is_code):
            raise UserError(
                f"data.columns.{key}: column {name!r} of {table.name} holds {kind}, not text; name another column."
            )


def _check_labels(table: RawTable, rows: Dataset, columns: Columns, names: set[str]) -> None:
    """Check that canonical rows have labels, and that the labels of the source are all words or all numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = rows.data.column("specialty")
    _refuse_rows(pc.is_null(labels), table, rows, "label", columns.label, "there is no label", _FILL_IN)
    numbers = sorted(name for name in names if _NUMBER.fullmatch(name))
    words = sorted(names - set(numbers))
    if numbers and words:
        choices = [(numbers, "a number stands among names"), (words, "a name stands among numbers")]
        rarer, fault = min(choices, key=lambda choice: len(choice[0]))
        remedy = (
            "correct such rows, or declare in data.labels what they mean (aliases) or that they are left out (drop)"
        )
        mask = pc.is_in(labels, value_set=pa.array(rarer, pa.string()))
        _refuse_rows(mask, table, rows, "label", columns.label, fault, remedy)


def _check_ids(split: str, tables: list[RawTable], parts: list[Dataset], columns: Columns) -> None:
    """Check that the id column names every row of a split, each by a different name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    given = [(table, rows) for table, rows in zip(tables, parts, strict=True) if id_column(table, columns)]
    chunks: list[pa.Array] = []
    for table, rows in given:
        ids = rows.data.column("id")
        missing = pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
        remedy = "fill it in or name another column"
        _refuse_rows(missing, table, rows, "id", id_column(table, columns), "there is no id", remedy)
        chunks += ids.chunks
    if pc.count_distinct(pa.chunked_array(chunks, pa.string())).as_py() == sum(len(rows) for _, rows in given):
        return
    seen: dict[str, str] = {}
    for table, rows in given:
        for number, identity in enumerate(rows["id"][:], start=1):
            place = f"{table.name}, row {number}"
            if identity in seen:
                raise UserError(
                    f"data.columns.id: {place} has the id {identity[:_MAX_NAME]!r} of {seen[identity]} (the {split}"
                    " split); make the ids unique or name another column in data.columns.id."
                )
            seen[identity] = place


def _refuse_rows(
    mask: pa.ChunkedArray, table: RawTable, rows: Dataset, key: str, column: str | None, fault: str, remedy: str
) -> None:
    """Raise a UserError that names the first canonical row where `mask` is true, if there is one."""
    import pyarrow.compute as pc

    places = pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()
    if not places:
        return
    if len(places) == len(rows):
        raise UserError(
            f"data.columns.{key}: column {column!r} of {table.name} is empty in every row; name another column."
        )
    identity = rows[places[0]]["id"]
    named = "" if identity is None or key == "id" else f" (id {identity[:_MAX_NAME]})"
    more = f", as in {len(places) - 1} more" if len(places) > 1 else ""
    raise UserError(f"data.columns.{key}: {table.name}, row {places[0] + 1}{named}: {fault}{more}; {remedy}.")
