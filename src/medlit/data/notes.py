"""From whatever `data.source` names to the four columns that everything else works with.

    id             text    the id column, or the first 16 digits of `text_hash`, with `-2`, `-3` ... for repeats
    transcription  text    the note; line ends are line feeds, outer white space is gone, the rest is untouched
    specialty      text    one spelling for each label (aliases applied, the commonest spelling wins); null: no label
    text_hash      text    32 digits of the BLAKE2b hash of the note with its white space collapsed

No other column gets past this file: what else a table holds, the public dataset's `keywords` for one, ends here. Two
notes with one `text_hash` are the same text. A row's number in an error counts from 1, header not included.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from medlit.data.cache import cache_folder, cache_key
from medlit.data.iter_column import iter_column
from medlit.data.label_rules import DROPPED, Spelling, check_label_column
from medlit.data.labels import normalise_text
from medlit.data.note_checks import check_columns, check_ids, check_labels, check_notes, id_column
from medlit.data.prompt import whole_characters
from medlit.data.settings import Columns, Labels
from medlit.data.sources import ALL, SPLITS, RawTable, as_text, read_tables
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = [
    "ALL",
    "CANONICAL",
    "SPLITS",
    "Columns",
    "Labels",
    "canonical_tables",
    "clean_note",
    "hash_text",
    "load_source",
    "read_tables",
]

VERSION = 1  # part of the cache's key: raise it when the same table would become other rows
CANONICAL = ("id", "transcription", "specialty", "text_hash")

_ID_DIGITS = 16


def load_source(
    source: str,
    *,
    revision: str | None = None,
    columns: Columns,
    labels: Labels,
    require_labels: bool = True,
) -> dict[str, Dataset]:
    """Read a source into canonical columns, cached: the second start maps the same files into memory.

    Args:
        source: `builtin`, a file, a folder, a glob or a Hub dataset id.
        revision: commit, tag or branch of a Hub dataset.
        columns: names of the source's columns.
        labels: aliases, labels to drop, and the fewest rows that a label must have (over the whole source).
        require_labels: False takes rows without a label, or a table without the label column, as they are (null), and
            drops no row.

    Returns:
        Split name (`train`, `validation`, `test`; `all` for a source without splits) -> its notes, in source order.

    Raises:
        UserError: the source cannot be read, or a row of it cannot be used.
    """
    return canonical_tables(read_tables(source, revision, columns), columns, labels, require_labels=require_labels)


def canonical_tables(
    tables: Mapping[str, list[RawTable]],
    columns: Columns,
    labels: Labels,
    *,
    require_labels: bool = True,
    check_rows: bool = True,
) -> dict[str, Dataset]:
    """The second half of `load_source`, for a caller that also needs the tables as they were read.

    Args:
        tables: what `read_tables` gave.
        columns: as for `load_source`.
        labels: as for `load_source`.
        require_labels: as for `load_source`.
        check_rows: False keeps empty notes and, as a null, missing labels; the audit counts them.

    Raises:
        UserError: a column is missing or of a wrong type, a note is empty, a label is missing, or an id stands twice.
    """
    from datasets import concatenate_datasets

    flat = [table for parts in tables.values() for table in parts]
    counts = Counter[str]()
    for table in flat:
        check_columns(table, columns, require_labels=require_labels)
        counts.update(_label_counts(table, columns.label))
    spelling = Spelling.of(counts, labels if require_labels else Labels(aliases=labels.aliases))
    names = {name for name in spelling.names.values() if name}

    result: dict[str, Dataset] = {}
    for split, parts in tables.items():
        canonical = [_canonical(table, columns, spelling) for table in parts]
        check_ids(split, parts, canonical, columns)
        for table, rows in zip(parts, canonical, strict=True):
            if check_rows:
                check_notes(table, rows, columns)
            if check_rows and require_labels:
                check_labels(table, rows, columns, names)
        result[split] = concatenate_datasets([_without_dropped(rows) for rows in canonical])
        if len(result[split]) == 0:
            raise UserError(f"data.labels: drop and min_count leave no row of {parts[0].name}; loosen them.")
    return _with_ids(result)


def hash_text(text: str) -> str:
    """32 hexadecimal digits that two notes share when they differ in white space only."""
    return hashlib.blake2b(normalise_text(text).encode(), digest_size=16).hexdigest()


def _label_counts(table: RawTable, label: str | None) -> Counter[str]:
    """Rows of each label as it is written in the table."""
    import pyarrow.compute as pc

    counts = Counter[str]()
    if label is None or label not in table.rows.column_names:
        return counts
    classes = table.classes(label)
    for batch in table.rows.select_columns([label]).with_format("arrow").iter(batch_size=10_000):
        for item in pc.value_counts(batch.column(0)).to_pylist():
            for name in as_text([item["values"]], classes):
                counts[name or ""] += item["counts"]
        check_label_column(counts, f"data.columns.label: column {label!r} of {table.name}")
    return counts


def _canonical(table: RawTable, columns: Columns, spelling: Spelling) -> Dataset:
    """The canonical columns of one table, row for row; a dropped label is `DROPPED` until `_without_dropped`."""
    import datasets

    rows = table.rows
    label = columns.label if columns.label in rows.column_names else None
    identity = id_column(table, columns)
    key = cache_key(VERSION, rows._fingerprint, columns, label, identity, sorted(spelling.names.items()))
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
                "spelling": spelling.names,
            },
            remove_columns=chosen,
            features=datasets.Features({name: datasets.Value("string") for name in CANONICAL}),
            # Named by us: a table that was saved to disk may lie in a folder that only others may write to.
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
    spelling: dict[str, str | None],
) -> pa.Table:
    """Canonical rows of a batch; its notes are the next of `notes`, so that the batch's own stay unread on disk."""
    import pyarrow as pa

    cleaned = [clean_note(note) for note in islice(notes, len(batch))]
    ids: list[str | None] = [None] * len(batch)
    specialties: list[str | None] = [None] * len(batch)
    if identity is not None:
        ids = as_text(batch.column(identity).to_pylist(), None)
    if label is not None:
        specialties = [spelling[name or ""] for name in as_text(batch.column(label).to_pylist(), classes)]
    hashes = [hash_text(note) for note in cleaned]
    return pa.table(
        dict(zip(CANONICAL, (ids, cleaned, specialties, hashes), strict=True)),
        schema=pa.schema([(name, pa.string()) for name in CANONICAL]),
    )


def clean_note(note: str | None) -> str:
    """A note as every later step sees it: whole characters, line feeds for line ends, no outer white space."""
    return "" if note is None else whole_characters(note).replace("\r\n", "\n").replace("\r", "\n").strip()


def _without_dropped(rows: Dataset) -> Dataset:
    import numpy as np
    import pyarrow.compute as pc

    kept = pc.fill_null(pc.not_equal(rows.data.column("specialty"), DROPPED), True).to_numpy()
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def _with_ids(tables: dict[str, Dataset]) -> dict[str, Dataset]:
    """Name the notes of tables without an id column by their text; the running number spans the splits."""
    seen = Counter[str]()
    result: dict[str, Dataset] = {}
    for split, rows in tables.items():
        given = rows.data.column("id") if rows._indices is None else rows.with_format("arrow")[:]["id"]
        if given.null_count == 0:
            result[split] = rows
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
