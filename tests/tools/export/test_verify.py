"""An export that answers differently is refused, by bounds that fit its number format."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medlit.errors import UserError
from medlit.tools.export import verify
from medlit.tools.export.verify import Reference, Verification, compare


def scored(monkeypatch: pytest.MonkeyPatch, scores: np.ndarray) -> None:
    """Have the fresh process return these log-likelihoods."""
    result: dict[str, Any] = {"log_likelihood": scores.tolist(), "tokens": None, "reader": "a test"}
    monkeypatch.setattr(verify, "run_worker", lambda _: result)


def test_changed_labels_and_drift_are_counted_apart() -> None:
    ours = np.array([[-1.0, -2.0], [-3.0, -1.0]])
    row = compare(ours, ours - 5.0, ["a", "b"], close=0.5)
    assert (row["changed"], row["drift_max"], row["all_median"]) == (0, 5.0, 5.0)
    row = compare(ours, np.array([[-1.0, -0.5], [-3.0, -1.0]]), ["a", "b"], close=0.5)
    assert (row["changed"], row["changed_ids"], row["drift_max"], row["all_max"]) == (1, ["a"], 0.0, 1.5)
    assert row["undecided"] == 0, "medlit's model held them 1 nat apart"


@pytest.mark.parametrize(
    ("quantisation", "limit", "moved", "passes"),
    [
        (None, None, 0.6, False),
        ("q8_0", None, 0.6, False),
        ("q4_k_m", None, 0.6, True),
        ("q4_k_m", None, 5.0, False),
        ("q4_k_m", 0.5, 0.6, False),
        ("f16", 1.0, 0.6, True),
    ],
)
def test_the_drift_bound_depends_on_the_number_format_unless_given(
    monkeypatch: pytest.MonkeyPatch, quantisation: str | None, limit: float | None, moved: float, passes: bool
) -> None:
    ours = np.array([[-1.0, -9.0], [-9.0, -1.0]])
    scored(monkeypatch, ours - moved)
    verification = Verification(Reference(["a", "b"], [], [[1], [2]], [], [], ours), 0.0, limit)
    refused = nullcontext() if passes else pytest.raises(UserError, match="max_drift: the file moves")
    with refused:
        verification.check("the file", "llama.cpp", Path("model.gguf"), "cpu", quantisation)
    assert verification.rows[0]["against_medlit"]["changed"] == 0


def test_clearly_changed_labels_count_whatever_drift_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = np.array([[-1.0, -2.0]])
    scored(monkeypatch, ours[:, ::-1])
    verification = Verification(Reference(["a"], [], [[1], [2]], [], [], ours), 0.02, 9.0)
    with pytest.raises(UserError, match="clearly gives 1 of 1 notes another"):
        verification.check("the file", "llama.cpp", Path("m.gguf"), "cpu")


def test_an_undecided_note_may_fall_either_way_and_is_reported() -> None:
    ours = np.array([[-1.0, -1.3], [-1.0, -1.6]])
    row = compare(ours, ours[:, ::-1], ["a", "b"], close=0.5)
    assert (row["changed"], row["undecided"], row["changed_ids"]) == (2, 1, ["a", "b"])
