"""The list of specialties: how a name is spelled, compared and read out of a model's answer.

Two spellings are the same label when `normalise_label` makes them equal (the recipe's rule: lower case, ` / ` and `-`
as `/`, white space collapsed). Everything that compares labels goes through that one function.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from medlit.errors import UserError

_SLASH = re.compile(r"\s*[-/]\s*")
_UNFINISHED = "\ufffd"


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
    """The K specialties of a task, in alphabetical order.

    Attributes:
        names: spelling of each specialty as the model is taught to answer it; position is the label id, 0 .. K-1.
    """

    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> LabelSet:
        """Collect the distinct labels of a table; of several spellings of one label the commonest stands.

        Raises:
            UserError: fewer than two distinct labels.
        """
        spellings: dict[str, Counter[str]] = {}
        for label in labels:
            spellings.setdefault(normalise_label(label), Counter())[normalise_text(label)] += 1
        names = [min(counts.items(), key=lambda item: (-item[1], item[0]))[0] for counts in spellings.values()]
        return cls.from_names(names)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> LabelSet:
        """Make a label set of names that are known to be distinct.

        Raises:
            UserError: fewer than two names, an empty one, or two that are the same after normalisation.
        """
        keys = [normalise_label(name) for name in names]
        if len(keys) < 2:
            found = f"only {names[0]!r}" if names else "none"
            raise UserError(f"data.columns.label: a classifier needs at least two labels and the table has {found}.")
        if "" in keys or len(set(keys)) != len(keys):
            raise UserError(f"labels: the names must be distinct and not empty, got {sorted(names)}.")
        return cls(tuple(sorted(names, key=normalise_label)))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def invalid(self) -> int:
        """Label id K: an answer that is not on the list."""
        return len(self.names)

    def index(self, name: str) -> int | None:
        """Label id of a specialty in any of its spellings, or None when it is not on the list."""
        key = normalise_label(name)
        return next((i for i, known in enumerate(self.names) if normalise_label(known) == key), None)

    def parse(self, answer: str) -> int:
        """Label id of a generated answer: its first line, normalised, on the list, or else `invalid`."""
        lines = answer.strip().splitlines()
        found = self.index(lines[0]) if lines else None
        return self.invalid if found is None else found

    def settled(self, text: str) -> bool:
        """Whether nothing that may follow `text` can change what `parse` makes of it.

        So it is when the first line is over, or can no longer be the beginning of a label in any accepted spelling.
        With no labels at all there is nothing to leave.

        Args:
            text: an answer as far as it was generated; a character that is not complete yet stands at its end as
                U+FFFD, and may still become any character.
        """
        begun = text.rstrip(_UNFINISHED).lstrip()
        if not begun or not self.names:
            return False
        line = begun.splitlines()[0]
        if len(line) < len(begun):
            return True
        start = _fold(normalise_label(line))
        # A space at the end may turn out to be nothing, a space, or part of a slash.
        starts = (start,) if line == line.rstrip() or start.endswith("/") else (f"{start} ", f"{start}/")
        return not any(key.startswith(starts) or key == start or _UNFINISHED in key for key in self._folded)

    @cached_property
    def _folded(self) -> tuple[str, ...]:
        return tuple(_fold(normalise_label(name)) for name in self.names)


def _fold(key: str) -> str:
    """A sigma is lower-cased by what follows it, which is not known of a beginning."""
    return key.replace("\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER SIGMA}")
