"""From any source, or a typed note, to the four columns that everything else works with.

    id             text    the id column, with 8 digits of `text_hash` after an id that a split has more than once; or
                           the first 16 digits of `text_hash`; `-2`, `-3` ... for repeats of these
    transcription  text    the note; line ends are line feeds, outer white space is removed, the rest is unchanged
    specialty      text    one spelling for each label (aliases applied, else the most frequent one); null: no label
    text_hash      text    32 digits of the BLAKE2b hash of the note with its white space collapsed

No other column passes this file: anything else in a table, such as the public dataset's `keywords`, ends here. Notes
with the same `text_hash` are the same text. Rows in error messages count from 1, header not included; no message
repeats a note.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medlit.data.cache import cache_folder, cache_key, iter_column
from medlit.data.labels import DROPPED, canonical_spellings, check_label_column, normalise_text
from medlit.data.prompt import whole_characters
from medlit.data.readers import decode_note, table_name
from medlit.data.settings import Columns, Labels, Predict
from medlit.data.sources import RawTable, as_text, read_tables
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)

VERSION = 1  # part of the cache's key: raise it when the same table would become different rows
CANONICAL = ("id", "transcription", "specialty", "text_hash")

_ID_DIGITS = 16
_REPEATED_DIGITS = 8
_MAX_NAME = 40  # characters of a column name or an id in an error message
_FILL_IN = "delete such rows or fill them in"
_CHAT = "a chat table: write the user's and the assistant's turns to two columns, and name these in data.columns"
# Columns by which the table of another tool is known -> how to read it.
_KNOWN_TABLES = {
    frozenset({"instruction", "output"}): "an Alpaca table: set data.columns.text to 'input' (or 'instruction', where"
    " the notes are there) and data.columns.label to 'output'",
    frozenset({"messages"}): _CHAT,
    frozenset({"conversations"}): _CHAT,
}
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def load_source(
    source: str,
    *,
    revision: str | None = None,
    columns: Columns,
    labels: Labels,
    require_labels: bool = True,  # False accepts rows or a table without labels (null), and drops no row
    join_ids: bool = False,  # True refuses repeated ids, by which the answers could not be joined with the table
    check_rows: bool = True,  # False keeps empty notes and, as a null, missing labels; the audit counts them
) -> dict[str, Dataset]:
    """Read a source into canonical columns, cached: the second start maps the same files into memory.

    Returns:
        Split name (`train`, `validation`, `test`; `all` for a source without splits) -> its notes, in source order.

    Raises:
        UserError: the source cannot be read, a column is missing or of a wrong type, a note is empty, or a label or an
            id is missing.
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
        _check_ids(split, parts, canonical, columns, join_ids)
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


def read_predict_notes(predict: Predict, columns: Columns, labels: Labels) -> Dataset:
    """Read the notes of `medlit predict` that are in no split: one typed note, or a source of their own.

    Raises:
        UserError: the note is empty, or the source cannot be read.
    """
    import datasets

    if predict.text is None:
        try:
            tables = load_source(predict.source, columns=columns, labels=labels, require_labels=False, join_ids=True)
        except UserError as error:
            raise UserError(str(error).replace("data.source", "data.predict.source", 1)) from error
        return datasets.concatenate_datasets(list(tables.values()))
    try:
        text = clean_note(decode_note(sys.stdin.buffer.read()) if predict.text == "-" else predict.text)
    except UserError as error:
        raise UserError(str(error).replace("data.source", "data.predict.text", 1)) from error
    if predict.text != "-" and _is_path(text):
        raise UserError(
            "data.predict.text: this is the name of a file and not a note; give a table of notes as"
            " data.predict.source, or the text of one file by `--data.predict.text - < FILE`."
        )
    if not text:
        raise UserError("data.predict.text: the note is empty; give its text, or '-' and the text on standard input.")
    return datasets.Dataset.from_dict({"id": ["text"], "transcription": [text], "specialty": [None]})


def _is_path(text: str) -> bool:
    """Whether a text is the name of a file that exists, or one word that looks like the name of a table or a path."""
    try:
        exists = Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or with characters that no name has
        return False
    path_like = text.startswith(("/", "./", "../", "~/")) or table_name(Path(text))[1] != ""
    return exists or (path_like and len(text.split()) == 1)


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
    identity = columns.of(rows.column_names)["id"]
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
    """Name the notes of tables without an id column by their text, and make repeated ids of a split unique by it.

    Ids made of texts do not depend on the order of the rows, and so neither does a split; repeats of the same text are
    numbered across splits.
    """
    import pyarrow.compute as pc

    seen = Counter[str]()
    result = dict(tables)
    for split, rows in tables.items():
        given = rows.data.column("id") if rows._indices is None else rows.with_format("arrow")[:]["id"]
        if given.null_count == 0 and pc.count_distinct(given).as_py() == len(given):
            continue
        times = Counter(given.to_pylist())
        ids = []
        for identity, text_hash in zip(given.to_pylist(), rows["text_hash"][:], strict=True):
            if identity is not None and times[identity] == 1:
                ids.append(identity)
                continue
            stem = text_hash[:_ID_DIGITS] if identity is None else f"{identity}-{text_hash[:_REPEATED_DIGITS]}"
            seen[stem] += 1
            ids.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
        key = cache_key(VERSION, "ids", rows._fingerprint, hashlib.blake2b("\n".join(ids).encode()).hexdigest())
        result[split] = rows.remove_columns("id").add_column("id", ids, new_fingerprint=key).select_columns(CANONICAL)
    return result


def _check_columns(table: RawTable, columns: Columns, require_labels: bool) -> None:
    """Check that the named columns exist and hold text, where text belongs."""
    import pyarrow as pa

    if require_labels and columns.label is None:
        raise UserError("data.columns.label: the labels are needed here; name the column that holds them.")
    names = table.rows.column_names
    for key, name in columns.of(names).items():
        if name is None or (key == "label" and name not in names and not require_labels):
            continue
        if name not in names:
            # A file without a header has note text in place of the names: long ones are not repeated.
            shown = ", ".join(known if len(known) <= _MAX_NAME else "(long text: no header?)" for known in names)
            advice = next((f"; this is {text}" for found, text in _KNOWN_TABLES.items() if found <= set(names)), "")
            whose = {"text": "note", "label": "specialty", "id": "id"}[key]
            raise UserError(
                f"data.columns.{key}: {table.name} has no column {name!r}; name the {whose}'s column with"
                f" --data.columns.{key} (its columns are {shown}){advice}."
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
            raise UserError(columns.no_text(key, table.name, kind))


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
        _refuse_rows(mask, table, rows, "label", columns.label, fault, remedy, is_empty=False)


def _check_ids(split: str, tables: list[RawTable], parts: list[Dataset], columns: Columns, join_ids: bool) -> None:
    """Check that the id column names every row of a split, and refuse or report names that are repeated."""
    import pyarrow as pa
    import pyarrow.compute as pc

    both = zip(tables, parts, strict=True)
    given = [(table, rows) for table, rows in both if columns.of(table.rows.column_names)["id"]]
    chunks: list[pa.Array] = []
    for table, rows in given:
        ids = rows.data.column("id")
        missing = pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
        remedy = "fill it in, name another column, or set data.columns.id to 'none' for hashes of the texts"
        identity = columns.of(table.rows.column_names)["id"]
        _refuse_rows(missing, table, rows, "id", identity, "there is no id", remedy)
        chunks += ids.chunks
    if pc.count_distinct(pa.chunked_array(chunks, pa.string())).as_py() == sum(len(rows) for _, rows in given):
        return
    seen: dict[str, str] = {}
    for table, rows in given:
        for number, identity in enumerate(rows["id"][:], start=1):
            place = f"{table.name}, row {number}"
            if identity in seen:
                fault = f"{place} has the id {identity[:_MAX_NAME]!r} of {seen[identity]} (the {split} split)"
                if join_ids:
                    raise UserError(
                        f"data.columns.id: {fault}, so that answers could not be joined with the table; make the ids"
                        " unique, name another column, or set 'none' for hashes of the texts, in the table's order."
                    )
                logger.warning("data.columns.id: %s; such ids get a hash of their texts as a suffix", fault)
                return
            seen[identity] = place


def _refuse_rows(
    mask: pa.ChunkedArray,
    table: RawTable,
    rows: Dataset,
    key: str,
    column: str | None,
    fault: str,
    remedy: str,
    is_empty: bool = True,  # whether the fault is an empty cell
) -> None:
    """Raise a UserError that names the first canonical row where `mask` is true, if there is one."""
    import pyarrow.compute as pc

    places = pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()
    if not places:
        return
    if is_empty and len(places) == len(rows):
        raise UserError(
            f"data.columns.{key}: column {column!r} of {table.name} is empty in every row; name another column."
        )
    identity = rows[places[0]]["id"]
    named = "" if identity is None or key == "id" else f" (id {identity[:_MAX_NAME]})"
    more = f", as in {len(places) - 1} more" if len(places) > 1 else ""
    raise UserError(f"data.columns.{key}: {table.name}, row {places[0] + 1}{named}: {fault}{more}; {remedy}.")
