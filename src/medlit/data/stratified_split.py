"""Which split a note goes to: pure functions of ids, text hashes, labels and a seed.

Nothing depends on the order of the rows, on the machine or on the Python version: groups are assigned in the order of a
keyed hash, and of equal rows the one with the smallest id is kept.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from medlit.data.settings import LabelConflicts, Split, SplitKind
from medlit.data.sources import ALL, SPLITS
from medlit.errors import UserError

LEAKED, CONFLICT, DUPLICATE = "leaked", "conflict", "duplicate"  # why a row is in no split


def resolve_kind(settings: Split, given: Iterable[str]) -> SplitKind:
    """What `auto` means for a source with these splits; a UserError if it lacks those that the kind needs."""
    names = set(given)
    if settings.kind == "auto":
        return "grouped" if ALL in names else "official"
    if settings.kind.startswith("official") and ALL in names:
        raise UserError(f"data.split.kind: {settings.kind} needs splits and the source has none; use grouped or kfold.")
    if settings.kind == "official_clean" and not ("train" in names and len(names) > 1):
        raise UserError("data.split.kind: official_clean needs a train split and a validation or test split.")
    return settings.kind


class Assignment(NamedTuple):
    """What becomes of each row."""

    split: list[str]  # `train`, `validation`, `test`, or why the row is in none: `leaked`, `conflict`, `duplicate`
    specialties: list[tuple[str, ...]]  # its labels, changed where a conflict was resolved by majority or merged


def assign(
    given: Sequence[str],  # split that the source puts each row in; `all` when it has none
    ids: Sequence[str],  # no two alike
    text_hashes: Sequence[str],
    specialties: Sequence[tuple[str, ...]],  # labels of each row
    groups: Sequence[int],  # number of each row's text group: equal texts and, where they count, near ones
    settings: Split,
    label_conflicts: LabelConflicts = "keep",
) -> Assignment:
    """Assign every row to a split, or say why it is in none; of equally common labels the first by name wins."""
    kind = resolve_kind(settings, given)
    pooled = kind in ("grouped", "kfold")
    split = ["train"] * len(ids) if pooled else list(given)
    labels = list(specialties)

    if kind == "official_clean":
        held_out = {group for group, name in zip(groups, split, strict=True) if name != "train"}
        known = zip(groups, split, strict=True)
        split = [LEAKED if name == "train" and group in held_out else name for group, name in known]
    if label_conflicts != "keep":
        resolve_conflicts(split, labels, ids, text_hashes, label_conflicts)
    if pooled:  # of rows with the same text and labels keep the one with the smallest id
        by_id = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
        kept = {(text_hashes[row], frozenset(labels[row])): row for row in by_id if split[row] == "train"}
        for row in {row for row in by_id if split[row] == "train"} - set(kept.values()):
            split[row] = DUPLICATE

    shares = shares_to_draw(kind, set(given), settings)
    if shares:
        rows = [row for row, name in enumerate(split) if name == "train"]
        # A group's key is the smallest hash of its texts, which comes last here.
        keys = {groups[row]: text_hashes[row] for row in sorted(rows, key=text_hashes.__getitem__, reverse=True)}
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            counts[keys[groups[row]]].update(labels[row] or ("",))
        assigned = stratified_group_split(counts, [share for _, share in shares], settings.seed)
        for row in rows:
            split[row] = shares[assigned[keys[groups[row]]]][0]
    return Assignment(split, labels)


def stratified_group_split(counts: Mapping[str, Counter[str]], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Assign groups to parts so that every part gets its share of every label; a group stays whole.

    Groups of several rows come first, each to the part with the least of its labels in proportion to its share
    (Webster's rule) among those with room for it. Single rows then fill the rest, so that every part has its share of
    every label to within one row if there are enough of them.

    `counts` is key of a group -> label -> rows; `shares` add up to 1. Returns key -> index of its part in `shares`.
    """
    totals = Counter[str]()
    for count in counts.values():
        totals.update(count)
    parts = [part for part, share in enumerate(shares) if share > 0]
    quota = {label: [total * share for share in shares] for label, total in totals.items()}
    missing = {label: list(rows) for label, rows in quota.items()}
    short = [totals.total() * share for share in shares]

    def crowded(count: Counter[str], part: int) -> float:
        rows = count.items()
        return sum(n * (quota[label][part] - missing[label][part] + n / 2) / quota[label][part] for label, n in rows)

    assigned: dict[str, int] = {}
    sizes = {key: sum(count.values()) for key, count in counts.items()}
    order = {key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in counts}
    for key in sorted(counts, key=lambda key: (-sizes[key], -len(counts[key]), order[key])):
        count = counts[key]
        fitting = []
        if sizes[key] > 1:
            fitting = [part for part in parts if all(missing[label][part] >= n - 1e-9 for label, n in count.items())]
        # Rounding errors must not decide, so the compared values are rounded.
        if fitting:
            part = min([(round(crowded(count, part), 6), part) for part in fitting])[1]
        else:
            needed = {part: sum([n * missing[label][part] for label, n in count.items()]) for part in parts}
            part = -max([(round(needed[part], 6), round(short[part], 6), -part) for part in parts])[2]
        assigned[key] = part
        for label, n in count.items():
            missing[label][part] -= n
            short[part] -= n
    return assigned


def shares_to_draw(kind: SplitKind, given: set[str], settings: Split) -> list[tuple[str, float]]:
    """Parts to divide the train rows into, as (split, share); none when the splits are as given."""
    if kind == "grouped":
        return list(zip(SPLITS, settings.shares, strict=True))
    if kind == "kfold":
        special = {settings.fold: "test", (settings.fold + 1) % settings.folds: "validation"}
        return [(special.get(fold, "train"), 1 / settings.folds) for fold in range(settings.folds)]
    lacking = [(name, share) for name, share in zip(SPLITS, settings.shares, strict=True) if name not in given]
    if settings.kind == "auto" and "train" in given and lacking:
        return [("train", 1 - sum(share for _, share in lacking)), *lacking]
    return []


def resolve_conflicts(
    split: list[str], labels: list[tuple[str, ...]], ids: Sequence[str], text_hashes: Sequence[str], how: LabelConflicts
) -> None:
    """Change split and labels of rows whose text has other labels in another row of the split.

    `merge` keeps the row with the smallest id, with its own labels first, whether the labels differ or not.
    """
    rows_of: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, text in enumerate(text_hashes):
        rows_of[split[row], text].append(row)
    for (name, _), rows in rows_of.items():
        if name == LEAKED or len(rows) == 1:
            continue
        differ = len({frozenset(labels[row]) for row in rows}) > 1
        votes = Counter(label for row in rows for label in labels[row])
        ordered = sorted(votes, key=lambda label: (-votes[label], label))
        first = min(rows, key=ids.__getitem__)
        if how == "merge":
            labels[first] = tuple(dict.fromkeys([*labels[first], *ordered]))
        for row in rows:
            if how == "merge":
                split[row] = name if row == first else DUPLICATE
            elif differ and how == "drop":
                split[row] = CONFLICT
            elif differ:
                labels[row] = (ordered[0],)
