"""The counts behind an audit, on arrays over the N notes of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from medlit.data.groups import IntArray

EXAMPLES = 20  # ids, or groups of ids, that a finding shows

_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
_BATCH = 1_000  # notes
_TOKENISED = 20_000  # notes; a tokenizer takes a minute for every 100,000, and percentiles need no more

CountTokens = Callable[[list[str]], Sequence[int]]
BoolArray = npt.NDArray[np.bool_]


def note_lengths(notes: Iterable[str], number: int, count_tokens: CountTokens | None) -> dict[str, IntArray]:
    """Lengths in words, (N,), and with a tokenizer those of at most 20,000 notes, evenly spaced, in tokens.

    Args:
        notes: gone through once, so they may come from disk.
        number: of the notes, N.
        count_tokens: notes -> tokens of each.
    """
    spaced = np.zeros(number, dtype=np.bool_)
    spaced[np.linspace(0, number - 1, min(number, _TOKENISED)).round().astype(np.int64)] = True
    words: list[int] = []
    tokens: list[int] = []
    left = iter(notes)
    while batch := list(islice(left, _BATCH)):
        chosen = spaced[len(words) : len(words) + len(batch)]
        words += [len(note.split()) for note in batch]
        if count_tokens is not None:
            tokens += count_tokens([note for note, counted in zip(batch, chosen, strict=True) if counted])
    lengths = {"words": np.array(words, dtype=np.int64)}
    if count_tokens is not None:
        lengths["tokens"] = np.array(tokens, dtype=np.int64)
    return lengths


def summary(lengths: IntArray, limit: int | None) -> dict[str, float]:
    """Distribution of lengths, (N,), and with a limit the share of notes that are cut at it."""
    points = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    found: dict[str, float] = {"notes": len(lengths), "min": int(lengths.min())}
    found["mean"] = round(float(lengths.mean()), 1)
    found |= {f"p{percent}": int(point) for percent, point in zip(_PERCENTILES, points, strict=True)}
    found["max"] = int(lengths.max())
    if limit is not None:
        found |= {"limit": limit, "share_cut": float((lengths > limit).mean())}
    return found


def by_count(specialties: Iterable[str | None]) -> dict[str, int]:
    """Specialty -> notes, the commonest first, of equally common ones by name."""
    counts = Counter(name for name in specialties if name is not None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def notes_where(mask: BoolArray, ids: Sequence[str]) -> dict[str, Any]:
    """How many notes a mask, (N,), chooses, and the first of their ids."""
    rows = np.flatnonzero(mask)
    return {"rows": len(rows), "ids": [ids[int(row)] for row in rows[:EXAMPLES]]}


def groups_where(groups: IntArray, chosen: BoolArray, ids: Sequence[str]) -> dict[str, Any]:
    """How many groups are chosen and how many notes are in them, and the ids of the first groups' notes.

    Args:
        groups: group of each note, (N,); a negative number for a note in none.
        chosen: whether each group counts, by group number.
        ids: of each note.
    """
    rows = np.flatnonzero((groups >= 0) & chosen[groups])
    numbers, first = np.unique(groups[rows], return_index=True)
    shown = numbers[np.argsort(first)][:EXAMPLES]
    members = [rows[groups[rows] == number][:EXAMPLES] for number in shown]
    return {"groups": len(numbers), "rows": len(rows), "ids": [[ids[int(row)] for row in part] for part in members]}


def several_texts(near: IntArray, texts: IntArray) -> BoolArray:
    """Which groups of alike texts hold texts that are not equal, by group number."""
    pairs = np.unique(np.stack([near, texts]), axis=1)
    return np.bincount(pairs[0], minlength=int(near.max()) + 1) > 1


def leakage(groups: IntArray, split: IntArray, names: Sequence[str]) -> dict[str, int]:
    """Notes of a later split whose text group stands in an earlier one: `earlier/later` -> notes.

    Args:
        groups: text group of each note, (N,).
        split: place of its split in `names`, (N,).
        names: of the splits.
    """
    parts = {name: groups[split == place] for place, name in enumerate(names)}
    return {f"{one}/{two}": int(np.isin(parts[two], parts[one]).sum()) for one, two in combinations(names, 2)}


@dataclass(frozen=True)
class Votes:
    """How often each text carries each label.

    Attributes:
        texts: text group of each pair of a text and a label that occurs, (P,).
        counts: labelled notes with that pair, (P,).
    """

    texts: IntArray
    counts: IntArray

    @classmethod
    def count(cls, texts: IntArray, specialties: Sequence[str]) -> Votes:
        """Count the labelled notes: their text groups, (M,), and their labels."""
        codes = np.unique(np.array(specialties, dtype=np.str_), return_inverse=True)[1].reshape(-1)
        several = int(codes.max(initial=0)) + 1
        pairs, counts = np.unique(texts * several + codes, return_counts=True)
        return cls(pairs // several, counts)

    def conflicting(self, groups: int) -> BoolArray:
        """Which of so many text groups carry more than one label."""
        return np.bincount(self.texts, minlength=groups) > 1

    @property
    def ceiling(self) -> float:
        """Share of the labelled notes that are right when each text is answered by its commonest label."""
        if len(self.texts) == 0:
            return 1.0
        best = np.zeros(int(self.texts.max()) + 1, dtype=np.int64)
        np.maximum.at(best, self.texts, self.counts)
        return float(best.sum() / self.counts.sum())
