"""Data quality of a table of notes: duplicates, labels, leakage between splits, lengths, revealing columns.

Texts are counted by their hashes and lengths batch by batch, so the audit of a table of any size needs no more private
memory than its hashes do. A report holds counts and row ids, never a note.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets

from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.groups import accuracy_ceiling, exact_groups, near_groups
from medlit.data.label_errors import label_errors
from medlit.data.labels import LabelReview, normalise_label
from medlit.data.notes import load_source, specialties_of
from medlit.data.prompt import NotePrompt
from medlit.data.sources import cell_labels, read_tables
from medlit.data.stratified_split import DUPLICATE, resolve_conflicts
from medlit.errors import report_if_slow
from medlit.evaluation.results import IntArray

NEAR_THRESHOLD = 0.8  # the usual one (Lee et al., 2021, arXiv:2107.06499), if none is declared
NEAR_ROWS = 50_000  # larger tables are searched for near duplicates only if a threshold is declared
SHORT = 20  # words
FEW = 10  # notes of a specialty; a tenth of them, the default share of a test split, is a single one
TOKENISED = 20_000  # notes; a tokenizer takes a minute for every 100,000, and percentiles need no more

_EXAMPLES = 20  # ids, or groups of ids, that a finding lists
_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
TOKENISED_AT_ONCE = 1_000  # notes
_MAX_CODES = 1_000  # different values; a column with more is not a code for the label
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class AuditReport:
    """The findings; `asdict` of it is `audit.json`. Findings of rows and of groups list the first ids."""

    source: str
    rows: int
    splits: dict[str, int]  # split -> notes; the one split `all` for a table without splits
    classes: dict[str, int]  # specialty -> notes, the most frequent first
    classes_by_split: dict[str, dict[str, int]]
    unlabelled: int
    # Unit (`words`; with a tokenizer also `tokens`, without the prompt's) -> notes counted, min, mean, p5 ... p99, max;
    # under `tokens` also `limit`, the most that fit in the prompt, and `share_cut`, the share of notes that are longer.
    # At most 20,000 notes, evenly spaced, are tokenised.
    lengths: dict[str, dict[str, float]]
    empty: dict[str, Any]  # notes without a word
    short: dict[str, Any]  # notes of 1 to 19 words
    duplicates: dict[str, Any]  # texts that occur more than once
    near_duplicates: dict[str, Any] | None  # groups that hold different but similar texts; None if not searched for
    near_threshold: float | None  # minimum Jaccard similarity of similar texts
    conflicts: dict[str, Any]  # texts that carry other specialties in another row
    # The labels, the number of texts that carry both, and its share of the rarer one's; the 20 most frequent pairs.
    label_pairs: list[dict[str, Any]]
    accuracy_ceiling: float  # share of the labelled notes that carry their text's most frequent label
    near_accuracy_ceiling: float | None  # the same when similar texts get one answer
    leakage: dict[str, int]  # `a/b` -> rows of split b whose text is also in split a
    near_leakage: dict[str, int] | None  # the same including similar texts
    label_leaks: dict[str, float]
    label_review: LabelReview  # labels that are probably not classes
    label_errors: dict[str, Any] | None  # of `label_errors`: labels hard to tell apart, notes probably mislabelled


class Audit(NamedTuple):
    """A report, and unit -> lengths of the notes that were counted, for a figure."""

    report: AuditReport
    lengths: dict[str, IntArray]


def audit(data: TranscriptionDataModule, load_prompt: Callable[[], NotePrompt | None] = lambda: None) -> Audit:
    """Audit a source before it is split, with empty and unlabelled notes counted instead of refused.

    Without a `near_threshold` it is 0.8, in tables of at most 50,000 notes only: the search takes a minute for every
    40,000. With `label_conflicts: merge`, rows of a split with the same text are one note. `load_prompt` is called once
    the table is found to be sound. Raises a UserError if the source cannot be read.
    """
    tables = load_source(
        data.source,
        revision=data.revision,
        columns=data.columns,
        labels=data.labels,
        require_labels=data.columns.label is not None,
        allow_missing=True,
    )
    prompt = load_prompt()
    pool = concatenate_datasets(list(tables.values()))
    specialties = specialties_of(pool)
    of_rows = [name for name, rows in tables.items() for _ in range(len(rows))]
    if data.label_conflicts == "merge":
        resolve_conflicts(of_rows, specialties, pool["id"][:], pool["text_hash"][:], "merge")
        kept = np.flatnonzero(np.array(of_rows) != DUPLICATE)
        pool, specialties = pool.select(kept), [specialties[row] for row in kept]
        of_rows = [of_rows[row] for row in kept]
    ids = pool["id"]  # read from disk one by one
    texts = exact_groups(pool["text_hash"][:])
    threshold = data.split.near_threshold or (NEAR_THRESHOLD if len(pool) <= NEAR_ROWS else None)
    near = texts if threshold is None else near_groups(pool["transcription"], texts, threshold)
    lengths = _lengths(pool, prompt)
    limits = {} if prompt is None else {"tokens": prompt.room}

    splits = {name: of_rows.count(name) for name in tables}
    notes = pd.DataFrame({"text": texts, "near": near, "words": lengths["words"]})
    notes["split"] = pd.Categorical(of_rows, categories=list(splits))
    notes["labels"] = ["\n".join(sorted(names)) or None for names in specialties]
    notes["own"] = specialties
    each = notes.explode("own").dropna(subset="own").sort_values("own")  # equally frequent ones by name
    by_text = notes.groupby("text")
    similar = notes.groupby("near")["text"].transform("nunique") > 1
    conflicting = (by_text["labels"].transform("nunique") > 1) & notes["labels"].notna()
    classes = dict(Counter(each["own"]).most_common())
    report = AuditReport(
        source=data.source,
        rows=len(notes),
        splits=splits,
        classes=classes,
        classes_by_split={name: dict(Counter(each.loc[each["split"] == name, "own"]).most_common()) for name in splits},
        unlabelled=int(notes["labels"].isna().sum()),
        lengths={unit: _summary(values, limits.get(unit)) for unit, values in lengths.items()},
        empty=_rows_where(notes["words"] == 0, ids),
        short=_rows_where(notes["words"].between(1, SHORT - 1), ids),
        duplicates=_groups_where(by_text["text"].transform("size") > 1, notes["text"], ids),
        near_duplicates=None if threshold is None else _groups_where(similar, notes["near"], ids),
        near_threshold=threshold,
        conflicts=_groups_where(conflicting, notes["text"], ids),
        label_pairs=_label_pairs(texts, specialties),
        accuracy_ceiling=accuracy_ceiling(texts, specialties),
        near_accuracy_ceiling=None if threshold is None else accuracy_ceiling(near, specialties),
        leakage=_leakage(notes, "text"),
        near_leakage=None if threshold is None else _leakage(notes, "near"),
        label_leaks=label_leaks(data),
        label_review=LabelReview.of(list(classes)),
        label_errors=label_errors(notes, pool["transcription"], ids),
    )
    return Audit(report, lengths)


def _lengths(notes: Dataset, prompt: NotePrompt | None) -> dict[str, IntArray]:
    """Lengths in words, (N,), and with a tokenizer those of at most `TOKENISED` notes, evenly spaced, in tokens."""
    texts = notes.select_columns(["transcription"])
    batches = texts.iter(batch_size=TOKENISED_AT_ONCE)
    counted = {"words": [len(note.split()) for rows in batches for note in rows["transcription"]]}
    if prompt is not None:
        template = len(prompt.header) + len(prompt.footer)
        spaced = np.linspace(0, len(notes) - 1, min(len(notes), TOKENISED)).round().astype(np.int64)
        batches = texts.select(spaced).iter(batch_size=TOKENISED_AT_ONCE)
        prompts = (one for rows in batches for one in prompt.prompts(rows["transcription"]))
        with report_if_slow(f"tokenising {len(spaced):,} notes"):
            counted["tokens"] = [len(one.input_ids) - template + one.cut_tokens for one in prompts]
    return {unit: np.array(lengths, dtype=np.int64) for unit, lengths in counted.items()}


def _summary(lengths: IntArray, limit: int | None) -> dict[str, float]:
    """Distribution of lengths, (N,), and with a limit the share of notes that are cut at it."""
    points = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    ends = {"notes": len(lengths), "min": int(lengths.min()), "mean": round(float(lengths.mean()), 1)}
    percentiles = {f"p{percent}": int(point) for percent, point in zip(_PERCENTILES, points, strict=True)}
    cut = {} if limit is None else {"limit": limit, "share_cut": float((lengths > limit).mean())}
    return ends | percentiles | {"max": int(lengths.max())} | cut


def _rows_where(mask: pd.Series, ids: Sequence[str]) -> dict[str, Any]:
    """Number of notes in a mask, and the first of their ids."""
    rows = np.flatnonzero(mask)
    return {"rows": len(rows), "ids": [ids[int(row)] for row in rows[:_EXAMPLES]]}


def _groups_where(mask: pd.Series, groups: pd.Series, ids: Sequence[str]) -> dict[str, Any]:
    """Number of groups and of notes in a mask, and the ids of the first groups' notes."""
    chosen = groups[mask]
    shown = [chosen.index[chosen == group][:_EXAMPLES] for group in chosen.unique()[:_EXAMPLES]]
    return {"groups": chosen.nunique(), "rows": len(chosen), "ids": [[ids[int(row)] for row in rows] for rows in shown]}


def _label_pairs(texts: IntArray, specialties: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """The pairs of labels that share the most texts."""
    of_text: defaultdict[int, set[str]] = defaultdict(set)
    for text, names in zip(texts.tolist(), specialties, strict=True):
        of_text[text].update(names)
    carrying = Counter(name for names in of_text.values() for name in names)
    pairs = Counter(sorted(pair for names in of_text.values() for pair in combinations(sorted(names), 2)))
    most = pairs.most_common(_EXAMPLES)
    return [{"labels": [*pair], "texts": n, "share": n / min(carrying[name] for name in pair)} for pair, n in most]


def _leakage(notes: pd.DataFrame, groups: str) -> dict[str, int]:
    """`earlier/later` -> notes of a later split whose group is also in an earlier one."""
    parts = {str(name): notes.loc[notes["split"] == name, groups] for name in notes["split"].unique()}
    return {f"{one}/{two}": int(parts[two].isin(parts[one]).sum()) for one, two in combinations(parts, 2)}


def label_leaks(data: TranscriptionDataModule) -> dict[str, float]:
    """Columns that give the label away; they never reach the model, but may be added to the text by hand.

    Returns column other than note, label and id -> share of its non-empty values that name a label of their row, or
    that recur only in rows that share a label, whichever is larger; columns without such values are left out.
    """
    values, naming = Counter[str](), Counter[str]()
    recurring = defaultdict[str, dict[str, tuple[int, frozenset[str]]]](dict)  # value -> its rows, labels of all these
    for name, value, labels in _other_columns(data):
        values[name] += 1
        naming[name] += any(f" {_words(own)} " in f" {_words(value)} " for own in labels)
        if value in recurring[name] or len(recurring[name]) <= _MAX_CODES:
            rows, shared = recurring[name].get(value, (0, labels))
            recurring[name][value] = (rows + 1, shared & labels)
    shares = {}
    for name, codes in recurring.items():
        is_text = len(codes) > min(_MAX_CODES, values[name] / 2)  # free text, of which hardly any value recurs
        coded = 0 if is_text else sum(rows for rows, shared in codes.values() if rows > 1 and shared)
        shares[name] = max(naming[name], coded) / values[name]
    return {name: share for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])) if share}


def _other_columns(data: TranscriptionDataModule) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield column other than note, label and id, value, and labels of its row; none of them empty."""
    columns, separator = data.columns, data.labels.separator
    for table in chain.from_iterable(read_tables(data.source, data.revision, columns).values()):
        if columns.label is None or columns.label not in table.rows.column_names:
            continue
        others = sorted(set(table.rows.column_names) - set(columns.of(table.rows.column_names).values()))
        chosen = table.rows.select_columns([columns.label, *others])
        for batch in chosen.with_format("arrow").iter(batch_size=10 * TOKENISED_AT_ONCE):
            written = cell_labels(batch.column(columns.label).to_pylist(), table.classes(columns.label), separator)
            labels = [frozenset(filter(None, map(normalise_label, names))) for names in written]
            for name in others:
                values = cell_labels(batch.column(name).to_pylist(), table.classes(name), None)
                pairs = zip(map(" ".join, values), labels, strict=True)
                yield from ((name, value, own) for value, own in pairs if own and value)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(normalise_label(text)))
