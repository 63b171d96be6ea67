"""Risk and coverage agree with hand calculation and do not depend on the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlit.evaluation import calibration


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
