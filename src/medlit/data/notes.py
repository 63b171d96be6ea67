"""From any source, or a typed note, to the five columns that everything else works with.

    id             text    the id column, with 8 digits of `text_hash` after an id that a split has more than once; or
                           the first 16 digits of `text_hash`; `-2`, `-3` ... for repeats of these
    transcription  text    the note; line ends are line feeds, outer white space is removed, the rest is unchanged
    specialty      text    one spelling for each label (aliases applied, else the most frequent one); null: no label; of
                           several labels the first
    text_hash      text    32 digits of the BLAKE2b hash of the note with its white space collapsed
    specialties    texts   all of the note's labels, none twice

No other column passes this file: anything else in a table, such as the public dataset's `keywords`, ends here. Notes
with the same `text_hash` are the same text.
"""

import hashlib
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from medlit.data.cache import cache_folder, cache_key
from medlit.data.columns import check_columns, check_ids, check_rows
from medlit.data.labels import DROPPED, canonical_spellings, check_label_column, normalise_text
from medlit.data.prompt import whole_characters
from medlit.data.readers import table_name
from medlit.data.settings import Columns, Labels, Predict
from medlit.data.sources import ALL, RawTable, as_text, cell_labels, read_tables
from medlit.data.text_files import decode_note
from medlit.errors import UserError, report_if_slow

CANONICAL = ("id", "transcription", "specialty", "text_hash", "specialties")

_ID_DIGITS = 16
_REPEATED_DIGITS = 8


def load_source(
    source: str,
    *,
    revision: str | None = None,
    columns: Columns,
    labels: Labels,
    require_labels: bool = True,  # False accepts rows or a table without labels (null), and drops no row
    join_ids: bool = False,  # True refuses repeated ids, by which the answers could not be joined with the table
    allow_missing: bool = False,  # True keeps empty notes and, as a null, missing labels; the audit counts them
) -> dict[str, Dataset]:
    """Read a source into canonical columns, cached: the second start maps the same files into memory.

    Returns split name (`train`, `validation`, `test`; `all` without splits) -> notes, in source order. Raises a
    UserError for a source or column that cannot be read, and for rows that lack a note, label or id.
    """
    with report_if_slow(f"reading {source}", has_bar=True):
        tables = read_tables(source, revision, columns)
        if join_ids:  # across splits too, which are one table of answers
            tables = {ALL: list(chain(*tables.values()))}
        counts = Counter[str]()
        for table in (table for parts in tables.values() for table in parts):
            check_columns(table, columns, require_labels)
            counts.update(_label_counts(table, columns.label, labels.separator))
        spellings = canonical_spellings(counts, labels if require_labels else Labels(aliases=labels.aliases))
        names = {name for name in spellings.values() if name}

        result: dict[str, Dataset] = {}
        for split, parts in tables.items():
            canonical = [_canonical(table, columns, spellings, labels.separator) for table in parts]
            check_ids(parts, canonical, columns, join_ids)
            for table, rows in zip(parts, canonical, strict=True):
                if not allow_missing:
                    check_rows(table, rows, columns, names if require_labels else None)
            joined = concatenate_datasets(canonical)
            kept = pc.fill_null(pc.not_equal(joined.data.column("specialty"), DROPPED), True).to_numpy()
            if not kept.any():
                raise UserError(f"data.labels: drop and min_count leave no row of {parts[0].name}; loosen them.")
            result[split] = joined if kept.all() else joined.select(np.flatnonzero(kept))
        return _with_ids(result)


def read_predict_notes(predict: Predict, columns: Columns, labels: Labels) -> Dataset:
    """Read the notes of `medlit predict` that are in no split: one typed note, or a separate source."""
    try:
        if predict.text is None:
            columns = Columns(text=columns.text, label=None, id=columns.id)  # whatever the labels are
            tables = load_source(predict.source, columns=columns, labels=labels, require_labels=False, join_ids=True)
            return concatenate_datasets(list(tables.values()))
        text = clean_note(decode_note(sys.stdin.buffer.read()) if predict.text == "-" else predict.text)
    except UserError as error:
        key = "source" if predict.text is None else "text"
        raise UserError(str(error).replace("data.source", f"data.predict.{key}", 1)) from error
    if predict.text != "-" and _is_path(text):
        raise UserError(
            "data.predict.text: this is the name of a file and not a note; give a table of notes as"
            " data.predict.source, or the text of one file by `--data.predict.text - < FILE`."
        )
    if not text:
        raise UserError("data.predict.text: the note is empty; give its text, or '-' and the text on standard input.")
    return Dataset.from_dict(
        {"id": ["text"], "transcription": [text], "specialty": [None], "text_hash": [""], "specialties": [[]]}
    )


def specialties_of(rows: Dataset) -> list[tuple[str, ...]]:
    """All labels of each note of a canonical or tokenised table, N of them."""
    if (pc.max(pc.list_value_length(rows.data.column("specialties"))).as_py() or 0) > 1:
        return [tuple(names) for names in rows["specialties"][:]]
    one: dict[str | None, tuple[str, ...]] = {None: ()}  # the usual table, of which a million rows take no second
    return [one.setdefault(name, (name,)) if name else () for name in rows["specialty"][:]]


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


def _label_counts(table: RawTable, label: str | None, separator: str | None) -> Counter[str]:
    """Rows of each label as the table writes it."""
    counts = Counter[str]()
    if label is None or label not in table.rows.column_names:
        return counts
    for batch in table.rows.select_columns([label]).with_format("arrow").iter(batch_size=10_000):
        column = batch.column(0)
        if pa.types.is_nested(column.type):
            column = pc.list_flatten(column)
        values, numbers = pc.value_counts(column).flatten()
        names = cell_labels(values.to_pylist(), table.classes(label), separator)
        for parts, number in zip(names, numbers.to_pylist(), strict=True):
            counts.update(dict.fromkeys(parts or ("",), number))
        check_label_column(counts, f"data.columns.label: column {label!r} of {table.name}")
    return counts


def _canonical(table: RawTable, columns: Columns, spellings: dict[str, str | None], separator: str | None) -> Dataset:
    """The canonical columns of one table, row for row; a label that is left out is `DROPPED`."""
    rows = table.rows
    label = columns.label if columns.label in rows.column_names else None
    identity = columns.of(rows.column_names)["id"]
    key = cache_key("notes", rows._fingerprint, columns, label, identity, sorted(spellings.items()), separator)
    chosen = [name for name in (columns.text, label, identity) if name is not None]
    used = rows.select_columns(chosen).with_format("arrow")
    classes = None if label is None else table.classes(label)
    text = datasets.Value("string")
    features = datasets.Features(dict.fromkeys(CANONICAL, text) | {"specialties": datasets.List(text)})

    def to_canonical(batch: pa.Table) -> pa.Table:
        cleaned = [clean_note(note) for note in batch.column(columns.text).to_pylist()]
        ids = [None] * len(batch) if identity is None else as_text(batch.column(identity).to_pylist(), None)
        written = [] if label is None else cell_labels(batch.column(label).to_pylist(), classes, separator)
        # Without what is left out; a row of nothing else is `DROPPED`.
        cells = [dict.fromkeys(spellings[name] for name in cell) for cell in written] or [{}] * len(batch)
        labels = [[name for name in cell if name] for cell in cells]
        specialties = [next(iter(kept or cell), None) for kept, cell in zip(labels, cells, strict=True)]
        values = (ids, cleaned, specialties, [hash_text(note) for note in cleaned], labels)
        return pa.table(dict(zip(CANONICAL, values, strict=True)), schema=features.arrow_schema)

    try:
        return used.map(
            to_canonical,
            batched=True,
            remove_columns=chosen,
            features=features,
            # An explicit name: of a Hub dataset, `datasets` would write the notes to its own folder.
            cache_file_name=str(cache_folder() / f"{key}.arrow"),
            new_fingerprint=key,
            desc="Reading notes",
        ).with_format(None)
    except UnicodeDecodeError:  # Arrow and Parquet files may hold any bytes as text
        raise UserError(f"data.source: {table.name} has text that is not UTF-8; export it again as UTF-8.") from None


def _with_ids(tables: dict[str, Dataset]) -> dict[str, Dataset]:
    """Name the notes of tables without an id column by their text, and make repeated ids of a split unique by it.

    Ids made of texts do not depend on the order of the rows, and so neither does a split; repeats of the same text are
    numbered across splits.
    """
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
        key = cache_key("ids", rows._fingerprint, hashlib.blake2b("\n".join(ids).encode()).hexdigest())
        result[split] = rows.remove_columns("id").add_column("id", ids, new_fingerprint=key).select_columns(CANONICAL)
    return result
