"""What can be wrong with a table of notes, counted before a GPU minute is spent on it.

Texts are counted by their hashes and lengths batch by batch, so a table of any size is audited in the memory that its
hashes take. A report holds counts and row ids, never a note.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medlit.data.audit_stats import (
    CountTokens,
    Votes,
    by_count,
    groups_where,
    leakage,
    note_lengths,
    notes_where,
    several_texts,
    summary,
)
from medlit.data.groups import IntArray, exact_groups, near_groups
from medlit.data.iter_column import iter_column
from medlit.data.label_leakage import label_leaks
from medlit.data.notes import Columns, Labels, canonical_tables, read_tables

NEAR_THRESHOLD = 0.8  # where none is declared: the usual one (Lee et al., 2021, arXiv:2107.06499)
NEAR_ROWS = 50_000  # more notes than that are compared with each other only where a threshold is declared
SHORT = 20  # words


@dataclass(frozen=True)
class AuditReport:
    """The findings; `as_dict` is `audit.json`.

    Attributes:
        source: what was audited.
        rows: notes.
        splits: split -> notes; the one split `all` for a table without splits.
        classes: specialty -> notes, the commonest first.
        classes_by_split: split -> specialty -> notes.
        unlabelled: notes without a specialty.
        lengths: unit (`words`; with a tokenizer also `tokens`, the transcription's alone) -> notes counted, min, mean,
            p5 ... p99, max; under `tokens` also `limit`, the most that fit in the prompt, and `share_cut`, the share of
            notes that are longer. Of large tables 20,000 notes, evenly spaced, are tokenised.
        empty: notes without a word: rows, and the first ids.
        short: notes of under 20 words, the empty ones not among them: likewise.
        duplicates: texts that occur more than once: groups, rows in them, the first groups' ids.
        near_duplicates: groups of different texts that are alike (equal ones among them count too): likewise; None when
            they were not looked for.
        near_threshold: Jaccard similarity from which on texts are alike; None when they were not compared.
        conflicts: texts that carry several specialties: likewise.
        accuracy_ceiling: share of the labelled notes that are right when each text is answered by its commonest label:
            no classifier of texts scores more on these rows.
        leakage: `a/b` -> rows of split b whose text stands in split a.
        near_leakage: the same where alike texts count; None when they were not looked for.
        label_leaks: column that is neither note, label nor id -> share of its non-empty values that name the label, or
            that occur with one label alone; columns without any are left out.
    """

    source: str
    rows: int
    splits: dict[str, int]
    classes: dict[str, int]
    classes_by_split: dict[str, dict[str, int]]
    unlabelled: int
    lengths: dict[str, dict[str, float]]
    empty: dict[str, Any]
    short: dict[str, Any]
    duplicates: dict[str, Any]
    near_duplicates: dict[str, Any] | None
    near_threshold: float | None
    conflicts: dict[str, Any]
    accuracy_ceiling: float
    leakage: dict[str, int]
    near_leakage: dict[str, int] | None
    label_leaks: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Audit:
    """A report, and the lengths behind it for a picture.

    Attributes:
        report: the findings.
        lengths: unit -> lengths of the notes that were counted.
    """

    report: AuditReport
    lengths: dict[str, IntArray]


def audit(
    source: str,
    *,
    revision: str | None = None,
    columns: Columns,
    labels: Labels,
    near_threshold: float | None = None,
    count_tokens: CountTokens | None = None,
    limit: int | None = None,
) -> Audit:
    """Audit a source as it is: before it is split, with empty and unlabelled notes counted instead of refused.

    Args:
        source: as for `load_source`.
        revision: as for `load_source`.
        columns: as for `load_source`.
        labels: as for `load_source`.
        near_threshold: Jaccard similarity from which on texts count as alike. None: 0.8, and only for tables of at most
            50,000 notes, since comparing takes a minute for every 40,000.
        count_tokens: transcriptions -> tokens of each.
        limit: most tokens of a transcription that fit in the prompt.

    Raises:
        UserError: the source cannot be read.
    """
    from datasets import concatenate_datasets

    raw = read_tables(source, revision, columns)
    tables = canonical_tables(raw, columns, labels, require_labels=columns.label is not None, check_rows=False)
    leaks = label_leaks([table for parts in raw.values() for table in parts], columns)
    del raw  # its mapped pages would count as this process's memory
    pool = concatenate_datasets(list(tables.values()))
    ids, specialties = pool["id"], pool["specialty"][:]
    texts = exact_groups(pool["text_hash"][:])
    notes = (note or "" for rows in tables.values() for note in iter_column(rows, "transcription"))
    lengths = note_lengths(notes, len(pool), count_tokens)

    threshold = near_threshold or (NEAR_THRESHOLD if len(pool) <= NEAR_ROWS else None)
    near = None if threshold is None else near_groups(pool["transcription"], texts, threshold)

    labelled = np.array([name is not None for name in specialties])
    votes = Votes.count(texts[labelled], [name for name in specialties if name is not None])
    split = np.repeat(np.arange(len(tables)), [len(rows) for rows in tables.values()])
    words = lengths["words"]
    report = AuditReport(
        source=source,
        rows=len(pool),
        splits={name: len(rows) for name, rows in tables.items()},
        classes=by_count(specialties),
        classes_by_split={name: by_count(rows["specialty"][:]) for name, rows in tables.items()},
        unlabelled=int((~labelled).sum()),
        lengths={unit: summary(values, limit if unit == "tokens" else None) for unit, values in lengths.items()},
        empty=notes_where(words == 0, ids),
        short=notes_where((words > 0) & (words < SHORT), ids),
        duplicates=groups_where(texts, np.bincount(texts) > 1, ids),
        near_duplicates=None if near is None else groups_where(near, several_texts(near, texts), ids),
        near_threshold=threshold,
        conflicts=groups_where(np.where(labelled, texts, -1), votes.conflicting(texts.max() + 1), ids),
        accuracy_ceiling=votes.ceiling,
        leakage=leakage(texts, split, list(tables)),
        near_leakage=None if near is None else leakage(near, split, list(tables)),
        label_leaks=leaks,
    )
    return Audit(report, lengths)
