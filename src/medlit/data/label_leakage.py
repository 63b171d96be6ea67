"""Columns beside the note that give its label away.

They never reach the model, but whoever adds one to the text by hand, or trusts a model that was given it, should know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from medlit.data.note_checks import id_column
from medlit.data.settings import Columns
from medlit.data.sources import RawTable, as_text

_BATCH = 10_000  # rows
_MOST_CODES = 1_000  # different values; a column with more is no code for the label
_WORD = re.compile(r"\w+")


@dataclass
class _Column:
    """What is known of one column so far.

    Attributes:
        values: rows whose value is not empty and that have a label.
        naming: those whose value contains the label's words.
        codes: value -> label -> rows; None once there are too many values.
    """

    values: int = 0
    naming: int = 0
    codes: dict[str, dict[str, int]] | None = field(default_factory=dict)

    def add(self, value: str, label: str) -> None:
        """Count one row."""
        self.values += 1
        self.naming += f" {_words(label)} " in f" {_words(value)} "
        if self.codes is not None:
            labels = self.codes.setdefault(value, {})
            labels[label] = labels.get(label, 0) + 1
            if len(self.codes) > _MOST_CODES:
                self.codes = None

    def share(self) -> float:
        """The larger of the shares of values that name the label and of values that stand for it."""
        standing = 0
        # A value that occurs once goes with one label by necessity, and free text hardly ever recurs.
        if self.codes is not None and 2 * len(self.codes) <= self.values:
            standing = sum(n for labels in self.codes.values() if len(labels) == 1 for n in labels.values() if n > 1)
        return max(self.naming, standing) / self.values if self.values else 0.0


def label_leaks(tables: Sequence[RawTable], columns: Columns) -> dict[str, float]:
    """Column -> share of its non-empty values that name the label, or that occur again and with one label alone.

    Columns that are note, label or id are not looked at, and those without any such value are left out.
    """
    found: dict[str, _Column] = {}
    for table in tables:
        others = set(table.rows.column_names) - {columns.text, columns.label, id_column(table, columns)}
        if columns.label is None or columns.label not in table.rows.column_names:
            continue
        names = [columns.label, *sorted(others)]
        classes = {name: table.classes(name) for name in names}
        for batch in table.rows.select_columns(names).with_format("arrow").iter(batch_size=_BATCH):
            texts = {name: as_text(batch.column(name).to_pylist(), classes[name]) for name in names}
            for name in sorted(others):
                column = found.setdefault(name, _Column())
                for value, label in zip(texts[name], texts[columns.label], strict=True):
                    if label and value and value.strip():
                        column.add(value, label)
    shares = {name: column.share() for name, column in found.items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])) if share > 0}


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))
