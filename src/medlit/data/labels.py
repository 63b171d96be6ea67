"""The list of specialties: how a name is spelled, compared, and parsed from an answer; the label rules of a source.

Two spellings are the same label when `normalise_label` makes them equal: the recipe's rule (lower case, ` / ` and `-`
as `/`, white space collapsed) after characters that look alike are made one. Tables, answers, aliases, `drop` and the
labels of an adapter are compared by that one function. What may also mean a difference, such as a full stop or `&` for
`and`, is kept apart and listed by `medlit audit`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Self

from medlit.data.settings import Labels
from medlit.errors import UserError, tell

DROPPED = ""  # the spelling of a label that is left out

_MAX_LABELS = 10_000
_MAX_LABEL_LENGTH = 100  # characters
_SLASH = re.compile(r"\s*[-/]\s*")
# Soft hyphen, zero-width space, direction marks, word joiner, byte-order mark.
_INVISIBLE = dict.fromkeys(
    [0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]
)
_ALIKE: dict[int, str | None] = {
    **_INVISIBLE,
    # Invisible too, but some scripts and emoji are spelled with them: joiners and variation selectors.
    **dict.fromkeys([0x34F, 0x200C, 0x200D, *range(0xFE00, 0xFE10)]),
    **dict.fromkeys([*range(0x2010, 0x2016), 0x2212, 0xFE58, 0xFE63, 0xFF0D], "-"),  # hyphens, dashes, minus signs
    **dict.fromkeys([0x2044, 0x2215, 0xFF0F], "/"),
    **dict.fromkeys([0x2018, 0x2019], "'"),
}
_WORD = re.compile(r"(?:[^\W_]|[+<>=#%]|(?<=\d)[\W_]+(?=\d))+")  # with what tells codes apart: 1.2 is not 12
_NO_LABEL = re.compile(
    r"[-/?._\s]+|[\W_]*(nan?|none|null|nil|nat|inf|infinity|n/a|tbd|missing|un(known|specified|defined|labell?ed)"
    r"|not (available|applicable|known|specified)|no (label|specialty|value|data))[\W_]*"
)
_INCOMPLETE = "\ufffd"  # stands for a character of which not all bytes are generated yet


def normalise_text(text: str) -> str:
    """Collapse white space: the form in which two transcriptions count as the same text."""
    return " ".join(text.split())


def normalise_label(name: str) -> str:
    """The form in which two spellings count as the same specialty.

    >>> normalise_label("Hematology \N{EN DASH} Oncology ") == normalise_label("hematology/oncology")
    True
    """
    return unicodedata.normalize("NFC", _recipe_key(unicodedata.normalize("NFC", name.translate(_ALIKE))))


def _recipe_key(name: str) -> str:
    return _SLASH.sub("/", normalise_text(name).lower())


@dataclass(frozen=True)
class LabelSet:
    """The K specialties of a task, in alphabetical order."""

    names: tuple[str, ...]  # as the model is taught to spell them; the position is the label id, 0 .. K-1

    @classmethod
    def from_names(cls, names: Sequence[str]) -> Self:
        """Make a label set; a UserError for fewer than two names, an empty one, or two that are the same."""
        keys = [_recipe_key(name) for name in names]
        if len(keys) < 2:
            given = f"only {names[0]!r}" if names else "none"
            raise UserError(f"data.columns.label: a classifier needs at least two labels and the table has {given}.")
        if "" in keys or len(set(keys)) != len(keys):
            raise UserError(f"labels: the names must be distinct and not empty, got {sorted(names)}.")
        return cls(tuple(sorted(names, key=_recipe_key)))

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
        label = self._ids.get(_recipe_key(name))
        return self._ids.get(normalise_label(name)) if label is None else label

    def parse(self, answer: str) -> int:
        """Label id of a generated answer: that of its first line with a visible character, or `invalid`."""
        label = self.index(next(filter(normalise_label, answer.splitlines()), ""))
        return self.invalid if label is None else label

    def settled(self, text: str) -> bool:
        """Whether nothing that may follow `text` can change what `parse` returns for it.

        This holds when the first line is over, or can no longer be the beginning of a label in any accepted spelling.
        It never holds without labels. A character of `text` that is not complete yet is U+FFFD at the end, and may
        become any character.
        """
        begun = text.rstrip(_INCOMPLETE).translate(_ALIKE).lstrip()
        if not begun or not self.names:
            return False
        line = begun.splitlines()[0]
        if len(line) < len(begun):
            return True
        start = _fold(normalise_label(line))
        starts: tuple[str, ...] = (f"{start} ", f"{start}/")  # a space at the end may become one of these, or nothing
        if line == line.rstrip() or start.endswith("/"):
            marks = next((n for n, mark in enumerate(reversed(start)) if not unicodedata.combining(mark)), len(start))
            starts = (start[: len(start) - marks],)  # a further mark may come before the last ones
        return not any(key.startswith(starts) or key == start or _INCOMPLETE in key for key in self._folded)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Label ids; of names that look alike each is found as it is written."""
        ids = {normalise_label(name): label for label, name in enumerate(self.names)}
        return ids | {_recipe_key(name): label for label, name in enumerate(self.names)}

    @cached_property
    def _folded(self) -> list[str]:
        return [_fold(normalise_label(name)) for name in self.names]


def canonical_spellings(counts: Mapping[str, int], rules: Labels) -> dict[str, str | None]:
    """Apply the rules of `data.labels` to the labels of a whole source, counted as its tables write them.

    Returns label as written (the empty text: none) -> its one spelling, None for no label, or `DROPPED`.
    """
    aliases = {normalise_label(name): normalise_text(meaning) for name, meaning in rules.aliases.items()}
    for name, meaning in rules.aliases.items():
        if normalise_label(other := aliases[normalise_label(name)]) != normalise_label(meaning):
            raise UserError(
                f"data.labels.aliases: the label {name!r} is given twice, for {meaning!r} and for {other!r}; keep one."
            )
    dropped = {normalise_label(name) for name in rules.drop}
    meanings = {raw: aliases.get(normalise_label(raw), normalise_text(raw)) for raw in counts}
    known = {normalise_label(name): name for name in [*counts, *meanings.values()]}
    for name in sorted({*rules.aliases, *rules.drop}):
        if counts and (key := normalise_label(name)) not in known:
            near = get_close_matches(key, known, 1) if name in rules.drop else []
            tell(f"data.labels: no row has the label {name!r}{f'; did you mean {known[near[0]]!r}?' if near else ''}")

    spellings: dict[str, Counter[str]] = {}
    for raw, name in meanings.items():
        spellings.setdefault(normalise_label(name), Counter())[name] += counts[raw]
    chosen: dict[str, str | None] = {}
    for key, written in spellings.items():
        # The spelling with the most rows; of equally frequent ones a plainly written one, the first in the alphabet.
        odd = {name: unicodedata.normalize("NFC", name.translate(_INVISIBLE)) != name for name in written}
        best = min(written, key=lambda name: (-written[name], odd[name], name))
        chosen[key] = best if key not in dropped and written.total() >= rules.min_count else DROPPED
    chosen[""] = None
    return {raw: chosen[normalise_label(name)] for raw, name in meanings.items()} | {"": None}


@dataclass(frozen=True)
class LabelReview:
    """What only a person can decide about labels: those that are probably not classes."""

    similar: dict[str, str]  # label -> the more frequent label that it nearly agrees with, or its visible text
    combined: dict[str, list[str]]  # label that holds several, such as `A; B` -> these, the most frequent first
    placeholders: list[str]  # labels that stand for a missing one, such as `nan`

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """Review the labels of a table, the most frequent first."""
        known = {normalise_label(name): (place, name) for place, name in enumerate(names)}
        placeholders = [name for name in names if _NO_LABEL.fullmatch(normalise_label(name))]
        combined = {name: parts for name in names if (parts := _parts(name, known))}
        frequent: dict[str, str] = {}  # key of a label -> the most frequent label with this key
        similar: dict[str, str] = {}
        for name in (name for name in names if name not in combined and name not in placeholders):
            keys = _similarity_keys(name)
            other = next((frequent[key] for key in keys if key in frequent), name)
            if other == name:
                frequent.update(dict.fromkeys(keys, name))
            if (visible := other.translate(_INVISIBLE)) != name:
                similar[name] = visible
        return cls(similar, combined, placeholders)

    def suggested(self, rules: Labels) -> Labels:
        """The rules with what would mend these labels; of several labels in one the most frequent is used."""
        aliases = rules.aliases | self.similar | {label: parts[0] for label, parts in self.combined.items()}
        similar = {normalise_label(label): meaning for label, meaning in self.similar.items()}
        aliases = {label: similar.get(normalise_label(meaning), meaning) for label, meaning in aliases.items()}
        return replace(rules, aliases=aliases, drop=[*rules.drop, *self.placeholders])


def _parts(name: str, known: Mapping[str, tuple[int, str]]) -> list[str]:
    """The labels in a label, at `;`, `|` and in a list's brackets, and at `,` and `+` if all are labels; else none."""
    certain = re.search(r"[;|]|^\[.*\]$", name)
    texts = re.split(r"[;|]" if re.search(r"[;|]", name) else r"[,+]", name)
    parts = [part for text in texts if (part := text.strip(" []'\""))]
    listed = sorted({known[key] for part in parts if (key := normalise_label(part)) in known})
    others = sorted({part for part in parts if normalise_label(part) not in known})
    return [*(label for _, label in listed), *others] if len(parts) > 1 and (certain or not others) else []


def _similarity_keys(name: str) -> list[str]:
    """Keys that two labels share if they differ in marks, accents, `&` or `and`, or a letter of a long word."""
    plain = unicodedata.normalize("NFKD", normalise_label(name).casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = [word for word in _WORD.findall(plain) if word != "and"]
    misspelled = [
        "".join([*words[:i], word[:j], word[j + 1 :], *words[i + 1 :]])
        for i, word in enumerate(words)
        for j in range(len(word) if len(word) >= 5 and word.isalpha() else 0)
    ]
    return ["".join(words), *misspelled] if words else []


def check_label_column(counts: Mapping[str, int], column: str) -> None:
    """Refuse a column that cannot hold labels before its values, with their rows, fill the memory or a message."""
    is_long = any(len(normalise_text(name)) > _MAX_LABEL_LENGTH for name in counts)
    if is_long or len(counts) > _MAX_LABELS:
        long = f"values of over {_MAX_LABEL_LENGTH} characters, too long for a label"
        fault = long if is_long else f"over {_MAX_LABELS} different values"
        raise UserError(f"{column} has {fault}; name the column of the specialties.")
    lists = [name for name in counts if re.fullmatch(r"\[(['\"].*)?\]", name.strip(), re.DOTALL)]
    if lists and len(lists) == sum(map(bool, counts)):
        remedy = "store lists in JSON Lines or Parquet, or write 'A; B' and set data.labels.separator to ';'"
        raise UserError(f"{column} has lists written as text; {remedy}.")


def _fold(key: str) -> str:
    """Undo what depends on what follows: composed accents, and the form of a sigma at the end of a word."""
    return unicodedata.normalize("NFD", key).replace("\u03c2", "\u03c3")
