"""Label rules of `data.labels`: one spelling for each label, declared aliases, labels to leave out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from medlit.data.labels import normalise_label, normalise_text
from medlit.data.settings import Labels
from medlit.errors import UserError

logger = logging.getLogger(__name__)

DROPPED = ""  # what `Spelling.names` gives for a label that is left out

_MOST_LABELS = 10_000
_LONGEST_LABEL = 100  # characters


@dataclass(frozen=True)
class Spelling:
    """How each label of a table is written from here on.

    Attributes:
        names: label as the table writes it (the empty text: none) -> its one spelling, None for none, or `DROPPED`.
    """

    names: dict[str, str | None]

    @classmethod
    def of(cls, counts: Mapping[str, int], rules: Labels) -> Spelling:
        """Apply the rules to the labels of a whole source.

        Args:
            counts: label as a table writes it -> its rows.
            rules: the declared rules.
        """
        aliases = {normalise_label(name): normalise_text(meant) for name, meant in rules.aliases.items()}
        dropped = {normalise_label(name) for name in rules.drop}
        meant = {raw: aliases.get(normalise_label(raw), normalise_text(raw)) for raw in counts}
        unused = sorted((aliases.keys() | dropped) - {normalise_label(name) for name in [*counts, *meant.values()]})
        if unused and counts:
            logger.warning("data.labels: no row has the label %s", ", ".join(map(repr, unused)))

        spellings: dict[str, Counter[str]] = {}
        for raw, name in meant.items():
            spellings.setdefault(normalise_label(name), Counter())[name] += counts[raw]
        chosen: dict[str, str | None] = {"": None}
        for key, written in spellings.items():
            if key:
                best = min(written, key=lambda name: (-written[name], name))
                kept = key not in dropped and written.total() >= rules.min_count
                chosen[key] = best if kept else DROPPED
        names = {raw: chosen[normalise_label(name)] for raw, name in meant.items()}
        names[""] = None
        return cls(names)


def check_label_column(counts: Mapping[str, int], where: str) -> None:
    """Refuse a column that cannot be one of labels before its texts fill the memory or an error message.

    Raises:
        UserError: a label is long as a text is, or there are more labels than any classifier here could learn.
    """
    if len(counts) > _MOST_LABELS:
        raise UserError(f"{where} has over {_MOST_LABELS} different values; name the column of the specialties.")
    if any(len(normalise_text(name)) > _LONGEST_LABEL for name in counts):
        raise UserError(
            f"{where} has values of over {_LONGEST_LABEL} characters, which no label has; name the column of the"
            " specialties."
        )
