"""Score and compare the systems of `folds.py` by the answers that they gave in each fold.

A table's rows are scored (`rows`), or its distinct texts with all their labels (`texts`). Strict: the answer is the
row's own label, of a text with several the first. Any-of: it is any label under which the text stands in the whole
table. What is fitted is fitted in each fold on its validation split: the temperature, the power of a second system, the
thresholds of sets. Copies of a text count once in sets and their coverage. Intervals draw groups of near duplicates,
for two systems the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from medlit.data.groups import exact_groups, near_groups
from medlit.evaluation.calibration import fit_powers, log_loss, power_product, reliability
from medlit.evaluation.intervals import Resamples, percentile_interval
from medlit.evaluation.results import BoolArray, FloatArray, IntArray, Results
from medlit.evaluation.sets import fit_f1_threshold, fit_thresholds, prediction_sets, score_sets

if TYPE_CHECKING:
    from medlit.data.datamodule import TranscriptionDataModule

COVERAGES = (0.9, 0.95)
_SMALLEST = 1e-15  # a probability that was rounded to 0
_SCALES = (0.05, 20.0)
_RESAMPLES = 2_000  # of micro F1


@dataclass(frozen=True)
class Units:
    """What is scored: U rows or texts, K labels."""

    names: tuple[str, ...]
    text_hashes: list[str]
    truth: IntArray  # (U,)
    accepted: BoolArray  # all labels of the text, (U, K)
    groups: IntArray  # near duplicates, (U,)
    by_rows: bool

    @classmethod
    def read(cls, data: TranscriptionDataModule, threshold: float, by_rows: bool) -> Units:
        """Read a source whose rows keep their own labels."""
        pool = data.read_splits().pool
        assert data.label_set is not None
        hashes, ids = pool["text_hash"][:], pool["id"][:]
        truth = np.array([data.label_set.index(name) for name in pool["specialty"][:]], dtype=np.int64)
        labels: dict[str, set[int]] = defaultdict(set)
        first: dict[str, int] = {}
        for row, (text, label) in enumerate(zip(hashes, truth.tolist(), strict=True)):
            labels[text].add(label)
            if text not in first or ids[row] < ids[first[text]]:
                first[text] = row
        exact = exact_groups(hashes)
        groups = near_groups(pool["transcription"], exact, threshold)
        kept = np.arange(len(pool)) if by_rows else np.array(sorted(first.values()))
        accepted = np.zeros((len(kept), len(data.label_set)), dtype=np.bool_)
        for unit, row in enumerate(kept):
            accepted[unit, list(labels[hashes[row]])] = True
        names = data.label_set.names
        return cls(names, [hashes[row] for row in kept], truth[kept], accepted, groups[kept], by_rows)

    @property
    def promised(self) -> BoolArray:
        """The labels of which a set holds one: the row's own, or any of the text's, (U, K)."""
        return np.eye(len(self.names), dtype=np.bool_)[self.truth] if self.by_rows else self.accepted


@dataclass(frozen=True)
class FoldAnswers:
    """One system in one fold: units and their probabilities at the fitted temperature."""

    validation: IntArray
    test: IntArray
    of_validation: FloatArray
    of_test: FloatArray
    exponents: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """A system's answers over the folds that it has, and their scores."""

    name: str
    units: Units
    folds: tuple[FoldAnswers, ...]
    on: str  # `test`, or `validation` to choose between variants

    @cached_property
    def positions(self) -> IntArray:
        """The units that were answered, (N,)."""
        return np.concatenate([getattr(fold, self.on) for fold in self.folds])

    @cached_property
    def probabilities(self) -> FloatArray:
        """Of the units at `positions`, (N, K)."""
        return np.concatenate([getattr(fold, f"of_{self.on}") for fold in self.folds])

    @cached_property
    def answer(self) -> IntArray:
        """Label ids, (N,)."""
        return self.probabilities.argmax(axis=1)

    @property
    def strict(self) -> BoolArray:
        """Whether each answer is the unit's own label, (N,)."""
        correct: BoolArray = self.answer == self.units.truth[self.positions]
        return correct

    @property
    def any_of(self) -> BoolArray:
        """Whether each answer is any label of the text, (N,)."""
        correct: BoolArray = self.units.accepted[self.positions, self.answer]
        return correct

    def sets(self, level: float | None) -> BoolArray:
        """Sets at a coverage, or those of the highest micro F1 in validation, (N, K); fitted in each fold."""
        found = []
        for fold in self.folds:
            labels = self.units.promised[fold.validation]
            if level is None:
                each = np.arange(len(fold.validation))
                threshold = fit_f1_threshold(fold.of_validation, self.units.accepted[fold.validation], each)
            else:
                copies = np.unique([self.units.text_hashes[i] for i in fold.validation], return_inverse=True)[1]
                threshold = float(fit_thresholds(fold.of_validation, labels, np.array([level]), copies)[0])
            found.append(prediction_sets(getattr(fold, f"of_{self.on}"), threshold))
        return np.concatenate(found)

    def row(self) -> dict[str, Any]:
        """The numbers of one system."""
        truth = self.units.truth[self.positions]
        resamples = Resamples(truth, self.answer[None], self.units.groups[self.positions], len(self.units.names), 1)
        coverage = {}
        for level in COVERAGES:
            copies = np.unique([self.units.text_hashes[i] for i in self.positions], return_inverse=True)[1]
            scores = score_sets(self.sets(level), self.units.promised[self.positions], copies)
            coverage[str(level)] = [scores["coverage"], scores["mean_size"]]
        row = {
            "system": self.name,
            "n": len(truth),
            "strict": float(self.strict.mean()),
            "any_of": float(self.any_of.mean()),
            "f1_macro": float(resamples.observed_f1_macro[0]),
            "log_loss": log_loss(self.probabilities, truth),
            "ece": reliability(self.probabilities.max(axis=1), self.strict).error,
            "coverage": coverage,
            "any_of_per_fold": [float(each) for each in self._per_fold(self.any_of)],
            "exponents": [fold.exponents for fold in self.folds],
        }
        if not self.units.by_rows:
            row["set_f1_micro"] = float(_micro_f1(_set_counts(self).sum(axis=1)))
        return row

    def _per_fold(self, correct: BoolArray) -> list[float]:
        ends = np.cumsum([len(getattr(fold, self.on)) for fold in self.folds])[:-1]
        return [part.mean() for part in np.split(correct, ends)]


def score(name: str, recipe: str, folder: Path, units: Units, folds: Sequence[int], on: str = "test") -> Scored | None:
    """Read a system's answers in each fold; None if no fold has all of them.

    Args:
        name: of the system.
        recipe: names of folders, `a + b * c`: the mean of a and b, times a power of c.
        folder: of all systems.
        units: what is scored.
        folds: those that are scored.
        on: the split that is scored.
    """
    members = [[one.strip() for one in part.split("+")] for part in recipe.split("*")]
    found = [_fold(folder, members, fold, units) for fold in folds]
    answered = tuple(fold for fold in found if fold is not None)
    return Scored(name, units, answered, on) if answered else None


def _fold(folder: Path, members: list[list[str]], fold: int, units: Units) -> FoldAnswers | None:
    """The calibrated answers of one fold."""
    split: dict[str, tuple[IntArray, list[FloatArray]]] = {}
    for name in ("validation", "test"):
        factors = []
        for part in members:
            files = [folder / one / f"fold_{fold}" / f"{name}_answers.parquet" for one in part]
            if not all(file.is_file() for file in files):
                return None
            tables = [_by_text(Results.read(file), units.names) for file in files]
            here = set(tables[0]).intersection(*tables[1:])
            factors.append({text: np.mean([table[text] for table in tables], axis=0) for text in here})
        common = set(factors[0]).intersection(*factors[1:])
        positions = np.array([i for i, text in enumerate(units.text_hashes) if text in common], dtype=np.int64)
        logs = [np.log(np.maximum([factor[units.text_hashes[i]] for i in positions], _SMALLEST)) for factor in factors]
        split[name] = positions, logs
    validation, logs = split["validation"]
    exponents = fit_exponents(logs, units.promised[validation], units.accepted[validation])
    return FoldAnswers(
        validation,
        split["test"][0],
        power_product(logs, exponents),
        power_product(split["test"][1], exponents),
        exponents,
    )


def _by_text(results: Results, names: tuple[str, ...]) -> dict[str, FloatArray]:
    """Probabilities of each text in the order of `names`."""
    assert results.probabilities is not None
    if results.names != names:
        raise SystemExit(f"a fold's labels are not the table's: {set(results.names) ^ set(names)}")
    return dict(zip(results.text_hashes, results.probabilities, strict=True))


def fit_exponents(logs: Sequence[FloatArray], promised: BoolArray, accepted: BoolArray) -> tuple[float, ...]:
    """The power of each system's probabilities: their ratios as medlit fits them, their scale by the temperature.

    Args:
        logs: log-probabilities of each system, (N, K).
        promised: the labels that the temperature gives the lowest log-loss, in equal shares, (N, K).
        accepted: all labels of each note, (N, K).
    """
    ratios = np.array(fit_powers(logs, accepted) if len(logs) > 1 else [1.0])
    scores = np.tensordot(ratios, np.stack(logs), 1)
    shares = promised / promised.sum(axis=1, keepdims=True)

    def loss(scale: float) -> float:
        return float(-(shares * log_softmax(scale * scores, axis=1)).sum(axis=1).mean())

    scale = minimize_scalar(loss, bounds=_SCALES, method="bounded").x
    return tuple(float(value) for value in scale * ratios)


def difference(a: Scored, b: Scored) -> dict[str, Any]:
    """A minus B on the units that both answered, in points (F1: as such), with paired 95 % intervals over groups."""
    _, of_a, of_b = np.intersect1d(a.positions, b.positions, return_indices=True)
    positions, units = a.positions[of_a], a.units
    truth, groups = units.truth[positions], np.unique(units.groups[positions], return_inverse=True)[1]
    row: dict[str, Any] = {"system": a.name, "against": b.name, "n": len(positions)}
    for metric in ("any_of", "strict"):
        hits = np.stack([getattr(a, metric)[of_a], getattr(b, metric)[of_b]]).astype(np.int64)
        drawn = Resamples(np.ones(len(positions), dtype=np.int64), hits, groups, 2).accuracy
        shares = hits.mean(axis=1)
        row[metric] = [100 * float(x) for x in (shares[0] - shares[1], *percentile_interval(drawn[0] - drawn[1]))]
    both = Resamples(truth, np.stack([a.answer[of_a], b.answer[of_b]]), groups, len(units.names))
    f1 = both.observed_f1_macro
    interval = percentile_interval(both.f1_macro[0] - both.f1_macro[1])
    row["f1_macro"] = [float(x) for x in (f1[0] - f1[1], *interval)]
    if not units.by_rows:
        counts = [_set_counts(one)[:, index] for one, index in ((a, of_a), (b, of_b))]
        n = groups.max() + 1
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _RESAMPLES)[:, groups].T  # (N, R)
        drawn_f1 = [_micro_f1(each @ weights) for each in counts]
        observed = [float(_micro_f1(each.sum(axis=1))) for each in counts]
        row["set_f1_micro"] = [observed[0] - observed[1], *percentile_interval(drawn_f1[0] - drawn_f1[1])]
    return row


def _set_counts(scored: Scored) -> IntArray:
    """Labels in both set and note, in the set, and in the note, (3, N)."""
    sets, labels = scored.sets(None), scored.units.accepted[scored.positions]
    return np.stack([(sets & labels).sum(axis=1), sets.sum(axis=1), labels.sum(axis=1)])


def _micro_f1(counts: IntArray) -> FloatArray:
    """Micro F1 of summed counts, (3, ...)."""
    return np.asarray(2 * counts[0] / np.maximum(counts[1] + counts[2], 1), dtype=np.float64)
