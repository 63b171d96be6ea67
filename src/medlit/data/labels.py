"""The list of specialties: how a name is spelled, compared, and parsed from an answer; the label rules of a source.

Two spellings are the same label when `normalise_label` makes them equal (the recipe's rule: lower case, ` / ` and `-`
as `/`, white space collapsed). Everything that compares labels uses that one function.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from medlit.data.settings import Labels
from medlit.errors import UserError

logger = logging.getLogger(__name__)

DROPPED = ""  # the spelling of a label that is left out

_MAX_LABELS = 10_000
_MAX_LABEL_LENGTH = 100  # characters
_SLASH = re.compile(r"\s*[-/]\s*")
_INCOMPLETE = "\ufffd"  # stands for a character of which not all bytes are generated yet


def normalise_text(text: str) -> str:
    """Collapse white space: the form in which two transcriptions count as the same text."""
    return " ".join(text.split())


def normalise_label(name: str) -> str:
    """The form in which two spellings count as the same specialty.

    >>> normalise_label("Hematology - Oncology ") == normalise_label("hematology/oncology")
    True
    """
    return _SLASH.sub("/", normalise_text(name).lower())


@dataclass(frozen=True)
class LabelSet:
    """The K specialties of a task, in alphabetical order."""

    names: tuple[str, ...]  # as the model is taught to spell them; the position is the label id, 0 .. K-1

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> LabelSet:
        """Collect the distinct labels of a table, each in its most frequent spelling."""
        spellings: dict[str, Counter[str]] = {}
        for label in labels:
            spellings.setdefault(normalise_label(label), Counter())[normalise_text(label)] += 1
        return cls.from_names([_most_frequent(counts) for counts in spellings.values()])

    @classmethod
    def from_names(cls, names: Sequence[str]) -> LabelSet:
        """Make a label set from distinct names.

        Raises:
            UserError: fewer than two names, an empty one, or two that are the same after normalisation.
        """
        keys = [normalise_label(name) for name in names]
        if len(keys) < 2:
            given = f"only {names[0]!r}" if names else "none"
            raise UserError(f"data.columns.label: a classifier needs at least two labels and the table has {given}.")
        if "" in keys or len(set(keys)) != len(keys):
            raise UserError(f"labels: the names must be distinct and not empty, got {sorted(names)}.")
        return cls(tuple(sorted(names, key=normalise_label)))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def invalid(self) -> int:
        """Label id K: an answer that is not in the list."""
        return len(self.names)

    def index(self, name: str) -> int | None:
        """Label id of a specialty in any of its spellings, or None if it is not in the list."""
        return self._ids.get(normalise_label(name))

    def parse(self, answer: str) -> int:
        """Label id of a generated answer: that of its first line, or `invalid`."""
        lines = answer.strip().splitlines()
        label = self.index(lines[0]) if lines else None
        return self.invalid if label is None else label

    def settled(self, text: str) -> bool:
        """Whether nothing that may follow `text` can change what `parse` returns for it.

        This holds when the first line is over, or can no longer be the beginning of a label in any accepted spelling.
        It never holds without labels. A character of `text` that is not complete yet is U+FFFD at the end, and may
        become any character.
        """
        begun = text.rstrip(_INCOMPLETE).lstrip()
        if not begun or not self.names:
            return False
        line = begun.splitlines()[0]
        if len(line) < len(begun):
            return True
        start = _fold(normalise_label(line))
        # A space at the end may become nothing, a space, or part of a slash.
        starts = (start,) if line == line.rstrip() or start.endswith("/") else (f"{start} ", f"{start}/")
        return not any(key.startswith(starts) or key == start or _INCOMPLETE in key for key in self._folded)

    @cached_property
    def _folded(self) -> list[str]:
        return [_fold(key) for key in self._ids]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {normalise_label(name): label for label, name in enumerate(self.names)}


def canonical_spellings(counts: Mapping[str, int], rules: Labels) -> dict[str, str | None]:
    """Apply the rules of `data.labels` to the labels of a whole source, counted as its tables write them.

    Returns:
        Label as a table writes it (the empty text: none) -> its one spelling, None for no label, or `DROPPED`.
    """
    aliases = {normalise_label(name): normalise_text(meaning) for name, meaning in rules.aliases.items()}
    dropped = {normalise_label(name) for name in rules.drop}
    meanings = {raw: aliases.get(normalise_label(raw), normalise_text(raw)) for raw in counts}
    known = {normalise_label(name) for name in [*counts, *meanings.values()]}
    unused = sorted((aliases.keys() | dropped) - known)
    if unused and counts:
        logger.warning("data.labels: no row has the label %s", ", ".join(map(repr, unused)))

    spellings: dict[str, Counter[str]] = {}
    for raw, name in meanings.items():
        spellings.setdefault(normalise_label(name), Counter())[name] += counts[raw]
    chosen: dict[str, str | None] = {}
    for key, written in spellings.items():
        kept = key not in dropped and written.total() >= rules.min_count
        chosen[key] = _most_frequent(written) if kept else DROPPED
    chosen[""] = None
    return {raw: chosen[normalise_label(name)] for raw, name in meanings.items()} | {"": None}


def check_label_column(counts: Mapping[str, int], column: str) -> None:
    """Refuse a column that cannot hold labels before its values, with their rows, fill the memory or a message."""
    if len(counts) > _MAX_LABELS:
        raise UserError(f"{column} has over {_MAX_LABELS} different values; name the column of the specialties.")
    if any(len(normalise_text(name)) > _MAX_LABEL_LENGTH for name in counts):
        raise UserError(
            f"{column} has values of over {_MAX_LABEL_LENGTH} characters, too long for a label; name the column of the"
            " specialties."
        )


def _most_frequent(spellings: Counter[str]) -> str:
    """The spelling with the most rows; of equally frequent ones the first in the alphabet."""
    return min(spellings, key=lambda name: (-spellings[name], name))


def _fold(key: str) -> str:
    """Ignore the two lower-case forms of sigma: which one is right depends on what follows."""
    return key.replace("\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER SIGMA}")
