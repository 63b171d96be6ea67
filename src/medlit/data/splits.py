"""Split the tables of a source, record the split of each row, and identify the notes that weights were trained with."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from medlit.atomic_io import atomic_write
from medlit.data.cache import cache_folder, cache_key
from medlit.data.groups import accuracy_ceiling, exact_groups, near_groups
from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.data.settings import LabelConflicts, Split, SplitKind
from medlit.data.sources import SPLITS
from medlit.data.stratified_split import Assignment, assign, resolve_kind, shares_to_draw
from medlit.errors import UserError, report_if_slow, tell

_TEXTS = pa.list_(pa.string())
_MANY = 0.1  # share of texts


@dataclass(frozen=True)
class NoteSplits:
    """Canonical notes by split."""

    notes: dict[str, Dataset]  # `train`, `validation`, `test` -> rows in source order; a split without rows is left out
    pool: Dataset  # every row of the source, split by split
    assignment: Assignment
    kind: SplitKind  # how they were split, `auto` resolved
    seed: int | None  # of the draw; None if all splits are as the source gives them
    near_threshold: float | None  # from which similar texts counted as one; None: identical texts only

    @property
    def record(self) -> pa.Table:
        """One row for each row of the source: columns id, split (or why it is in none) and text_hash."""
        rows = {"id": self.pool["id"][:], "split": self.assignment.split, "text_hash": self.pool["text_hash"][:]}
        return pa.table(rows, schema=pa.schema([(name, pa.string()) for name in rows]))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Split -> 32 digits that change with any of its rows' ids, texts or labels, and not with their order."""
        # Whole columns of the pool: row by row, or by way of a split's row numbers, takes many times as long.
        columns = [self.pool[name][:] for name in ("id", "text_hash")]
        lines: dict[str, list[str]] = {}
        for (split, labels), *row in zip(zip(*self.assignment, strict=True), *columns, strict=True):
            lines.setdefault(split, []).append("\t".join([*row, *labels]))
        texts = {split: "\n".join(sorted(lines[split])).encode() for split in self.notes}
        return {split: hashlib.blake2b(text, digest_size=16).hexdigest() for split, text in texts.items()}

    def require(self, split: str, source: str) -> Self:
        """Raise a UserError if the source has no such split."""
        if split in self.notes:
            return self
        if self.seed is None:
            raise UserError(f"data.source: {source} has no {split} split; add it, or set data.split.kind to 'grouped'.")
        raise UserError(
            f"data.source: none of the {len(set(self.pool['text_hash'][:])):,} texts of {source} is in the {split}"
            f" split; add notes, or change data.split.{'folds' if self.kind == 'kfold' else 'shares'}."
        )

    def label_set(self, source: str) -> LabelSet:
        """The training split's labels; a UserError if they are fewer than two, or another split has a further one."""
        if "train" not in self.notes:
            raise UserError(
                f"data.source: {source} has no train split, which defines the labels; add one, or set data.split.kind"
                " to 'grouped' to split it here."
            )
        pairs = {(split, name) for split, labels in set(zip(*self.assignment, strict=True)) for name in labels}
        label_set = LabelSet.from_names([name for split, name in pairs if split == "train"])
        for split, rows in self.notes.items():
            unknown = sorted(name for where, name in pairs if where == split and label_set.index(name) is None)
            if unknown:
                columns = zip(rows["id"][:], specialties_of(rows), strict=True)
                first = next(identity for identity, labels in columns if unknown[0] in labels)
                raise UserError(
                    f"data.columns.label: the {split} split has the label {unknown[0]!r} (first in note {first!r}),"
                    " which the training split does not have; map it with data.labels.aliases, leave it out with"
                    " data.labels.drop, or set data.split.kind to 'grouped'."
                )
        return label_set

    def warn_if_ambiguous(self) -> None:
        """Print a sentence about a source with many texts that carry other labels in other rows."""
        texts, own = self.pool["text_hash"][:], self.assignment.specialties
        kinds = Counter(text for text, _ in set(zip(texts, map(frozenset, own), strict=True)))
        several = sum(number > 1 for number in kinds.values())
        if several >= _MANY * len(kinds):
            tell(
                f"data.label_conflicts: {several:,} of {len(kinds):,} texts carry several labels, so that one answer"
                f" can be right for {accuracy_ceiling(texts, own):.1%} of the rows at most; set it to merge."
            )


def split_notes(tables: Mapping[str, Dataset], settings: Split, label_conflicts: LabelConflicts = "keep") -> NoteSplits:
    """Split the tables of `load_source`; a UserError if the settings do not fit the source."""
    kind = resolve_kind(settings, tables)
    draws = len(shares_to_draw(kind, set(tables), settings)) > 0
    if not draws and kind == "official":  # groups change no split
        settings = replace(settings, near_threshold=None)
    pool, given = _pool(tables)
    labels = specialties_of(pool)
    result = _assignment(pool, given, labels, settings, label_conflicts)
    if result.specialties != labels:
        key, columns = cache_key("specialties", pool._fingerprint, result.specialties), pool.column_names
        pool = pool.remove_columns(["specialty", "specialties"])
        pool = pool.add_column("specialty", [names[0] for names in result.specialties], new_fingerprint=f"{key}-first")
        pool = pool.add_column("specialties", pa.array(result.specialties, _TEXTS), new_fingerprint=key)
        pool = pool.select_columns(columns)
    notes: dict[str, Dataset] = {}
    for split in SPLITS:
        rows = np.flatnonzero(np.asarray(result.split) == split)
        if len(rows):
            key = cache_key("rows", pool._fingerprint, split, hashlib.blake2b(rows.tobytes()).hexdigest())
            notes[split] = pool.select(rows, new_fingerprint=key)
    return NoteSplits(notes, pool, result, kind, settings.seed if draws else None, settings.near_threshold)


def _assignment(
    pool: Dataset, given: list[str], labels: list[tuple[str, ...]], settings: Split, label_conflicts: LabelConflicts
) -> Assignment:
    """Assign the rows of a pool, or read the cached assignment: a million rows take half a minute."""
    key = cache_key("split", pool._fingerprint, sorted(Counter(given).items()), settings, label_conflicts)
    path = cache_folder() / f"{key}.parquet"
    if path.exists():
        known = pq.read_table(path)
        return Assignment(known["split"].to_pylist(), [tuple(names) for names in known["specialties"].to_pylist()])
    texts = pool["text_hash"][:]
    groups = exact_groups(texts)
    if settings.near_threshold is not None:
        groups = near_groups(pool["transcription"], groups, settings.near_threshold)
    with report_if_slow(f"splitting {len(given):,} notes"):
        result = assign(given, pool["id"][:], texts, labels, groups.tolist(), settings, label_conflicts)
    with atomic_write(path) as temporary:
        columns = {"split": pa.array(result.split, pa.string()), "specialties": pa.array(result.specialties, _TEXTS)}
        pq.write_table(pa.table(columns), temporary)
    return result


def _pool(tables: Mapping[str, Dataset]) -> tuple[Dataset, list[str]]:
    """All rows in one table, and the source's split of each; ids that occur in two splits are prefixed by the split."""
    ids = {split: rows["id"][:] for split, rows in tables.items()}
    given = [split for split, names in ids.items() for _ in names]
    if len(set().union(*ids.values())) == len(given):
        return concatenate_datasets(list(tables.values())), given
    parts = []
    for split, rows in tables.items():
        key = cache_key("id", rows._fingerprint, split)
        named = rows.remove_columns("id").add_column("id", [f"{split}/{i}" for i in ids[split]], new_fingerprint=key)
        parts.append(named.select_columns(rows.column_names))
    return concatenate_datasets(parts), given


@dataclass(frozen=True)
class DataFingerprint:
    """Which notes a checkpoint or an adapter was trained with, and a warning where it is used with others; no text."""

    source: str  # `data.source` as it was given
    revision: str | None  # the commit of a Hub dataset where it is known, else `data.revision`
    hashes: dict[str, str]  # as in `NoteSplits.hashes`

    @classmethod
    def from_dict(cls, values: object) -> Self | None:
        """Read what `asdict` gave; None for other names, as in weights of other tools; a UserError for other types."""
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            return None
        read = cls(**values)
        hashes = [*read.hashes, *read.hashes.values()] if isinstance(read.hashes, dict) else [None]
        if not all(isinstance(text, str) for text in (read.source, read.revision or "", *hashes)):
            raise UserError("ckpt_path: the stored data fingerprint is corrupt; copy the weights again.")
        return read

    def warn_if_different(self, theirs: Self | None, source: str) -> str | None:
        """Print and return which splits are not those of some weights, `source`; None if none, or they are unknown."""
        other = [split for split in SPLITS if theirs and self.hashes.get(split) != theirs.hashes.get(split)]
        if theirs is None or not other:
            return None
        listed = f"{', '.join(other[:-1])} and {other[-1]} splits are" if other[1:] else f"{other[0]} split is"
        then, now = (f"{one.source} at {one.revision}" if one.revision else one.source for one in (theirs, self))
        moved = f"data.source was {then} and is {now}" if then != now else f"{now} or its data settings have changed"
        warning = (
            f"the {listed} not what {source} was trained with ({moved}): notes scored here may have been trained on,"
            " and scores do not compare with those of the fit."
        )
        tell(warning)
        return warning
