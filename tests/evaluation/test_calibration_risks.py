"""Risk and coverage agree with hand calculation and do not depend on the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import make_results

from medlit.evaluation import calibration
from medlit.evaluation.metrics import uncertainty


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_risk_and_coverage_do_not_depend_on_the_order(notes: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(notes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (p, right), (q, other) = (map(np.array, zip(*some, strict=True)) for some in (notes, shuffled))
    assert calibration.risks(p, right) == pytest.approx(calibration.risks(q, other))
    assert calibration.risks(p, right)[-1] == pytest.approx(1 - right.mean())


def test_risk_and_coverage_by_hand() -> None:
    """Right, wrong, and two equally sure of which one is right: risks 0, 1/2, 1/2, 1/2."""
    confidence, right = np.array([0.9, 0.8, 0.5, 0.5]), np.array([True, False, True, False])
    assert calibration.risks(confidence, right) == pytest.approx([0, 1 / 2, 1.5 / 3, 2 / 4])


def test_scores_of_the_most_confident_notes_by_hand() -> None:
    """Risks of right, wrong, right, right, right: 0, 1/2, 1/3, 1/4, 1/5; 80 % are four notes, 90 % four as well."""
    sure = [0.9, 0.8, 0.7, 0.6, 0.55]
    found = uncertainty(make_results([0, 1, 0, 0, 0], [0] * 5, [[p, 1 - p, 0.0] for p in sure]))
    assert found["aurc"] == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert (found["accuracy_at_80"], found["accuracy_at_90"]) == (pytest.approx(3 / 4), pytest.approx(3 / 4))
