"""Split the tables of a source, and record the split of each row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medlit.atomic_io import atomic_write
from medlit.data.cache import cache_folder, cache_key
from medlit.data.groups import exact_groups, near_groups
from medlit.data.labels import LabelSet
from medlit.data.settings import LabelConflicts, Split, SplitKind
from medlit.data.sources import SPLITS
from medlit.data.stratified_split import Assignment, assign, resolve_kind
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

VERSION = 1  # part of the cache's key: raise it when the same notes would be split otherwise


@dataclass(frozen=True)
class NoteSplits:
    """Canonical notes by split.

    Attributes:
        notes: `train`, `validation`, `test` -> canonical rows in source order; a split without rows is left out.
        pool: every row of the source, split by split.
        assignment: the split of each row of the pool.
        kind: how they were split, `auto` resolved.
    """

    notes: dict[str, Dataset]
    pool: Dataset
    assignment: Assignment
    kind: SplitKind

    @cached_property
    def record(self) -> pa.Table:
        """One row for each row of the source: columns id, split (or why it is in none) and text_hash."""
        import pyarrow as pa

        rows = {"id": self.pool["id"][:], "split": self.assignment.split, "text_hash": self.pool["text_hash"][:]}
        return pa.table(rows, schema=pa.schema([(name, pa.string()) for name in rows]))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Split -> 32 digits that change with any of its rows' ids, texts or labels, and not with their order."""
        # Whole columns of the pool: row by row, or by way of a split's row numbers, takes many times as long.
        columns = [self.pool[name][:] for name in ("id", "text_hash", "specialty")]
        lines: dict[str, list[str]] = {}
        for split, *row in zip(self.assignment.split, *columns, strict=True):
            lines.setdefault(split, []).append("\t".join(map(str, row)))
        return {split: _digest(lines[split]) for split in self.notes}

    @cached_property
    def labels(self) -> dict[str, set[str | None]]:
        """Split -> the labels that its rows have."""
        pairs = set(zip(self.assignment.split, self.assignment.specialty, strict=True))
        return {split: {name for where, name in pairs if where == split} for split in self.notes}

    def label_set(self, source: str) -> LabelSet:
        """The training split's labels.

        Args:
            source: `data.source`, as a message names it.

        Raises:
            UserError: there is no training split, it has fewer than two labels, or another split has a label that the
                training split lacks.
        """
        if "train" not in self.notes:
            raise UserError(
                f"data.source: {source} has no train split, which defines the labels; add one, or set data.split.kind"
                " to 'grouped' to split it here."
            )
        label_set = LabelSet.from_labels(name for name in self.labels["train"] if name)
        for split, rows in self.notes.items():
            unknown = sorted(name for name in self.labels[split] if name and label_set.index(name) is None)
            if unknown:
                columns = zip(rows["id"][:], rows["specialty"][:], strict=True)
                first = next(identity for identity, name in columns if name == unknown[0])
                raise UserError(
                    f"data.columns.label: the {split} split has the label {unknown[0]!r} (first in note {first!r}),"
                    " which the training split does not have; map it with data.labels.aliases, leave it out with"
                    " data.labels.drop, or set data.split.kind to 'grouped'."
                )
        return label_set

    def write(self, path: Path) -> None:
        """Write the record as Parquet (`split.parquet`); the file appears whole."""
        import pyarrow.parquet as pq

        with atomic_write(path) as temporary:
            pq.write_table(self.record, temporary)


def split_notes(tables: Mapping[str, Dataset], settings: Split, label_conflicts: LabelConflicts = "keep") -> NoteSplits:
    """Split canonical tables.

    Args:
        tables: what `load_source` gave.
        settings: how to divide the notes.
        label_conflicts: as for `assign`.

    Raises:
        UserError: the settings do not fit the source.
    """
    kind = resolve_kind(settings, tables)
    pool, given = _pool(tables)
    result = _assignment(pool, given, settings, label_conflicts)
    specialties = pool["specialty"][:]
    if result.specialty != specialties:
        key = cache_key("specialty", pool._fingerprint, result.specialty)
        named = pool.remove_columns("specialty").add_column("specialty", result.specialty, new_fingerprint=key)
        pool = named.select_columns(pool.column_names)
    where = np.asarray(result.split)
    notes = {split: _take(pool, np.flatnonzero(where == split), split) for split in SPLITS if (where == split).any()}
    return NoteSplits(notes, pool, result, kind)


def _assignment(pool: Dataset, given: list[str], settings: Split, label_conflicts: LabelConflicts) -> Assignment:
    """Assign the rows of a pool, or read the cached assignment: a million rows take half a minute."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = sorted(Counter(given).items())
    path = (
        cache_folder() / f"{cache_key('split', VERSION, pool._fingerprint, sizes, settings, label_conflicts)}.parquet"
    )
    if path.exists():
        known = pq.read_table(path)
        return Assignment(known["split"].to_pylist(), known["specialty"].to_pylist())
    kind = resolve_kind(settings, given)
    texts = pool["text_hash"][:]
    groups = exact_groups(texts)
    if kind != "official" and settings.near_threshold is not None:
        groups = near_groups(pool["transcription"], groups, settings.near_threshold)
    result = assign(given, pool["id"][:], texts, pool["specialty"][:], groups.tolist(), settings, label_conflicts)
    with atomic_write(path) as temporary:
        columns = {"split": pa.array(result.split, pa.string()), "specialty": pa.array(result.specialty, pa.string())}
        pq.write_table(pa.table(columns), temporary)
    return result


def _pool(tables: Mapping[str, Dataset]) -> tuple[Dataset, list[str]]:
    """All rows in one table, and the source's split of each; ids that occur in two splits are prefixed by the split."""
    from datasets import concatenate_datasets

    ids = {split: rows["id"][:] for split, rows in tables.items()}
    if len(set().union(*ids.values())) < sum(map(len, ids.values())):
        tables = {
            split: rows.remove_columns("id")
            .add_column("id", [f"{split}/{name}" for name in ids[split]], new_fingerprint=_key(rows, split))
            .select_columns(rows.column_names)
            for split, rows in tables.items()
        }
    given = [split for split, rows in tables.items() for _ in range(len(rows))]
    return concatenate_datasets(list(tables.values())), given


def _key(rows: Dataset, split: str) -> str:
    return cache_key("id", rows._fingerprint, split)


def _take(pool: Dataset, rows: np.ndarray, split: str) -> Dataset:
    key = cache_key("rows", pool._fingerprint, split, hashlib.blake2b(rows.tobytes()).hexdigest())
    return pool.select(rows, new_fingerprint=key)


def _digest(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()
