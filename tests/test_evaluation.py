"""Numbers beyond counting: each is another library's or a hand's, and none depends on the order of the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from medlit.errors import UserError
from medlit.evaluation import calibration, selective
from medlit.evaluation.compare import compare
from medlit.evaluation.intervals import Resamples, interval, wilson
from medlit.evaluation.results import Results
from medlit.evaluation.uncertainty import doubt

NAMES = ("Bones", "Heart", "Nerves")


def answered(
    truth: list[int],
    answer: list[int],
    probabilities: list[list[float]] | None = None,
    texts: list[str] | None = None,
    names: tuple[str, ...] = NAMES,
) -> Results:
    n = len(truth)
    return Results(
        names=names,
        rows=np.arange(n),
        ids=[f"note-{i}" for i in range(n)],
        text_hashes=texts or [f"{i:032x}" for i in range(n)],
        truth=np.array(truth),
        answer=np.array(answer),
        probabilities=None if probabilities is None else np.array(probabilities, dtype=float),
        tokens=np.full(n, 9),
        cut_tokens=np.zeros(n, dtype=np.int64),
    )


def drawn(n: int = 200, k: int = 5, seed: int = 0, signal: float = 2.0) -> Results:
    """Answers of a made-up system, some notes having one text."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, k, n)
    scores = draw.normal(size=(n, k)) + signal * np.eye(k)[truth]
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    texts = [f"text-{i}" for i in draw.integers(0, n, n)]
    names = tuple(f"specialty {i}" for i in range(k))
    return answered(truth.tolist(), p.argmax(axis=1).tolist(), p.tolist(), texts, names)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_wilson_is_newcombe_s_example() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_resampled_scores_are_scikit_learn_s_on_the_same_resample() -> None:
    """With every text in one group there is but one resample: the notes as they are."""
    one = drawn()
    answer = one.answer.copy()
    answer[:9] = len(one.names)  # off the list
    both = Resamples(one.truth, np.stack([one.answer, answer]), np.zeros(len(one), dtype=int), len(one.names), 3)
    for system, answers in enumerate((one.answer, answer)):
        labels = list(range(len(one.names)))
        macro = sk.f1_score(one.truth, answers, labels=labels, average="macro", zero_division=0)
        assert both.f1_macro[system] == pytest.approx([macro] * 3)
        assert both.observed_f1_macro[system] == pytest.approx(macro)
        assert both.accuracy[system] == pytest.approx([sk.accuracy_score(one.truth, answers)] * 3)


def test_the_bootstrap_is_the_plain_one_over_texts() -> None:
    one = drawn(n=120, k=3)
    fast = Resamples(one.truth, one.answer[None], one.groups, 3)
    draw = np.random.default_rng(1)
    members = [np.flatnonzero(one.groups == group) for group in range(one.groups.max() + 1)]
    slow = []
    for _ in range(2000):
        rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        slow.append(
            (
                (one.answer == one.truth)[rows].mean(),
                sk.f1_score(one.truth[rows], one.answer[rows], average="macro", zero_division=0),
            )
        )
    accuracy, f1 = np.array(slow).T
    assert interval(fast.accuracy[0]) == pytest.approx(interval(accuracy), abs=0.012)
    assert interval(fast.f1_macro[0]) == pytest.approx(interval(f1), abs=0.012)
    assert fast.f1_macro[0].std() == pytest.approx(f1.std(), rel=0.1)


def test_independent_notes_have_the_binomial_s_spread() -> None:
    one = answered([0] * 60 + [1] * 40, [0] * 100)
    found = doubt(one)["accuracy_ci_bootstrap"]
    assert found == pytest.approx(np.array(binom.interval(0.95, 100, 0.6)) / 100, abs=0.011)


def test_copies_of_a_text_add_no_certainty() -> None:
    once = answered([0, 1, 2, 0, 1, 2] * 10, [0, 1, 2, 0, 1, 0] * 10)
    rows = [*range(60)] * 8
    copied = answered(
        once.truth[rows].tolist(), once.answer[rows].tolist(), texts=[once.text_hashes[row] for row in rows]
    )
    assert doubt(copied)["f1_macro_ci"] == pytest.approx(doubt(once)["f1_macro_ci"], abs=1e-9)
    narrower = np.diff(doubt(copied)["accuracy_ci"]) / np.diff(doubt(once)["accuracy_ci"])
    assert narrower < 0.5  # Wilson's takes notes as independent


def test_the_interval_holds_the_score_and_is_the_same_again() -> None:
    one = drawn()
    found = doubt(one)
    low, high = found["f1_macro_ci"]
    assert low < sk.f1_score(one.truth, one.answer, average="macro") < high
    assert doubt(one) == found


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_scores_of_probabilities_are_scikit_learn_s() -> None:
    one = drawn()
    assert one.probabilities is not None
    found = doubt(one)
    labels = list(range(len(one.names)))
    assert found["log_loss"] == pytest.approx(sk.log_loss(one.truth, one.probabilities, labels=labels))
    assert found["top3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(one.truth, one.probabilities, k=3))
    squares = [sk.brier_score_loss(one.truth == i, one.probabilities[:, i]) for i in labels]
    assert found["brier"] == pytest.approx(sum(squares))


def test_reliability_has_the_bins_of_scikit_learn() -> None:
    one = drawn(n=200)
    confidence = one.confidence
    assert confidence is not None
    bins = calibration.reliability(confidence, one.correct, bins=8)
    accuracy, mean = calibration_curve(one.correct, confidence, n_bins=8, strategy="quantile")
    assert bins.notes.tolist() == [25] * 8
    assert bins.accuracy == pytest.approx(accuracy)
    assert bins.confidence == pytest.approx(mean)


def test_calibration_error_by_hand() -> None:
    """Bins (0.5, 0.6: one of two right) and (0.8, 0.9: both right): (|0.55 - 0.5| + |0.85 - 1|) / 2."""
    confidence, correct = np.array([0.9, 0.5, 0.8, 0.6]), np.array([True, False, True, True])
    assert calibration.reliability(confidence, correct, bins=2).error == pytest.approx(0.1)


def test_a_probability_of_zero_costs_much_and_not_infinitely_much() -> None:
    assert 30 < calibration.log_loss(np.array([[1.0, 0.0]]), np.array([1])) < 40


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(t: float) -> None:
    """Truth drawn from the probabilities is calibrated; the fit must undo whatever sharpened them since."""
    draw = np.random.default_rng(0)
    honest = draw.dirichlet(np.ones(4), size=4000)
    truth = np.array([draw.choice(4, p=p) for p in honest])
    spoilt = calibration.at_temperature(honest, 1 / t)
    found = calibration.fit_temperature(spoilt, truth)
    assert found == pytest.approx(t, rel=0.06)
    mended = calibration.at_temperature(spoilt, found)
    assert calibration.log_loss(mended, truth) <= calibration.log_loss(spoilt, truth) + 1e-9
    assert np.array_equal(mended.argmax(axis=1), spoilt.argmax(axis=1))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_risk_and_coverage_do_not_depend_on_the_order(notes: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(notes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (p, right), (q, other) = (map(np.array, zip(*some, strict=True)) for some in (notes, shuffled))
    assert selective.risks(p, right) == pytest.approx(selective.risks(q, other))
    assert selective.risks(p, right)[-1] == pytest.approx(1 - right.mean())
    assert selective.aurc(p, right) == pytest.approx(selective.risks(p, right).mean())
    assert selective.curve(p, right)[-1] == (1.0, pytest.approx(1 - right.mean()))


def test_risk_and_coverage_by_hand() -> None:
    """Right, wrong, and two equally sure of which one is right: risks 0, 1/2, 1/2, 1/2."""
    confidence, right = np.array([0.9, 0.8, 0.5, 0.5]), np.array([True, False, True, False])
    assert selective.risks(confidence, right) == pytest.approx([0, 1 / 2, 1.5 / 3, 2 / 4])
    assert selective.accuracy_at(0.25, confidence, right) == 1
    assert selective.accuracy_at(0.9, confidence, right) == pytest.approx(0.5)


def test_without_probabilities_their_numbers_are_null() -> None:
    found = doubt(answered([0, 1, 2], [0, 3, 2]))
    null = {name for name, value in found.items() if value is None}
    assert null == set(found) - {"accuracy_ci", "accuracy_ci_bootstrap", "f1_macro_ci"}


def test_an_answer_off_the_list_has_no_confidence() -> None:
    one = answered([0, 1], [0, 3], [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    assert one.confidence == pytest.approx([0.7, 0])


# --- two systems ------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    """Nine notes part the two, eight to one: 2 (1 + 9) / 2^9."""
    truth = [0] * 20
    a = answered(truth, [0] * 8 + [1] + [0] * 11)
    b = answered(truth, [1] * 8 + [0] + [0] * 11)
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.mcnemar_p == pytest.approx(20 / 512)
    assert found.accuracy_difference == pytest.approx(7 / 20)
    words = found.words("the words")
    assert words.startswith("Against the words: +35.0 points of accuracy (8 notes that it alone got right, 1 that only")
    assert "p 0.039), which can be told from chance" in words


def test_a_system_cannot_be_told_from_itself() -> None:
    one = drawn()
    found = compare(one, one)
    assert found.mcnemar_p == 1
    assert found.f1_macro_ci == (0, 0)
    assert found.words("itself").count("which cannot be told from chance") == 2


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """Two systems that err on the same notes differ by little, however uncertain each score is."""
    one = drawn(n=300)
    answer = one.answer.copy()
    wrong = np.flatnonzero(one.correct)[:12]
    answer[wrong] = (answer[wrong] + 1) % len(one.names)
    worse = replace(one, answer=answer, probabilities=None)
    paired = compare(one, worse)
    width = float(np.diff(doubt(one)["f1_macro_ci"])[0])
    assert np.diff(paired.f1_macro_ci)[0] < 0.7 * width
    assert paired.f1_macro_ci[0] > 0
    order = np.random.default_rng(0).permutation(len(worse))
    shuffled = replace(
        worse,
        ids=[worse.ids[i] for i in order],
        text_hashes=[worse.text_hashes[i] for i in order],
        truth=worse.truth[order],
        answer=worse.answer[order],
    )
    assert compare(one, shuffled) == paired


def test_other_notes_cannot_be_compared() -> None:
    one = drawn()
    for other in (drawn(seed=1), drawn(n=100), replace(one, names=(*one.names[1:], "other"))):
        with pytest.raises(UserError, match="not tested on the same notes"):
            compare(one, other)


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_a_record_is_read_back_as_it_was_written(tmp_path: Path, with_probabilities: bool) -> None:
    one = answered([0, 1, 2], [0, 3, 2], [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0, 0, 1]] if with_probabilities else None)
    one.write(tmp_path / "test_answers.parquet")
    again = Results.read(tmp_path / "test_answers.parquet")
    for name, value in vars(one).items():
        assert np.array_equal(getattr(again, name), value), name
    assert [path.name for path in tmp_path.iterdir()] == ["test_answers.parquet"]


def test_parts_are_joined_in_the_order_of_the_table_and_repeats_once() -> None:
    one = drawn(n=7, k=3)
    picks = ([3, 0, 5], [1, 6, 3], [2, 4])
    parts = [
        replace(
            one,
            rows=one.rows[rows],
            ids=[one.ids[row] for row in rows],
            text_hashes=[one.text_hashes[row] for row in rows],
            truth=one.truth[rows],
            answer=one.answer[rows],
            probabilities=one.probabilities[rows],  # type: ignore[index]
            tokens=one.tokens[rows],
            cut_tokens=one.cut_tokens[rows],
        )
        for rows in picks
    ]
    joined = Results.join(parts)
    assert joined.ids == one.ids
    assert joined.text_hashes == one.text_hashes
    assert np.array_equal(joined.probabilities, one.probabilities)  # type: ignore[arg-type]
    parts[1] = replace(parts[1], probabilities=None)
    assert Results.join(parts).probabilities is None


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test_answers.parquet"
    with pytest.raises(UserError, match=r"test_answers\.parquet is missing or damaged"):
        Results.read(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test_answers\.parquet is missing or damaged"):
        Results.read(path)
