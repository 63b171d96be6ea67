"""The label rules of `data.labels`: one spelling for each label, declared aliases, labels that are left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from medlit.data.labels import most_frequent, normalise_label, normalise_text
from medlit.data.settings import Labels
from medlit.errors import UserError

logger = logging.getLogger(__name__)

DROPPED = ""  # the spelling of a label that is left out

_MAX_LABELS = 10_000
_MAX_LABEL_LENGTH = 100  # characters


def canonical_spellings(counts: Mapping[str, int], rules: Labels) -> dict[str, str | None]:
    """Apply the rules to the labels of a whole source.

    Args:
        counts: label as a table writes it (the empty text: none) -> its rows.
        rules: the declared rules.

    Returns:
        Label as a table writes it -> its one spelling, None for no label, or `DROPPED`.
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
        chosen[key] = most_frequent(written) if kept else DROPPED
    chosen[""] = None
    return {raw: chosen[normalise_label(name)] for raw, name in meanings.items()} | {"": None}


def check_label_column(counts: Mapping[str, int], column: str) -> None:
    """Refuse a column that cannot hold labels before its texts fill the memory or an error message.

    Args:
        counts: value -> its rows.
        column: the column, as an error message names it.

    Raises:
        UserError: a value is too long for a label, or there are more values than a classifier here could learn.
    """
    if len(counts) > _MAX_LABELS:
        raise UserError(f"{column} has over {_MAX_LABELS} different values; name the column of the specialties.")
    if any(len(normalise_text(name)) > _MAX_LABEL_LENGTH for name in counts):
        raise UserError(
            f"{column} has values of over {_MAX_LABEL_LENGTH} characters, too long for a label;"
            " name the column of the specialties."
        )
