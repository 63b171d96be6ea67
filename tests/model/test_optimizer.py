"""AdamW8bit's learning rate follows the schedule, and the current settings override a checkpoint's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medlit.model.optimizer import apply_settings, make_optimizer, make_schedule
from medlit.model.settings import Optimizer


@pytest.mark.parametrize(
    ("schedule", "steps", "shares"),
    [
        ("cosine", 4, [0, 1, 0.75, 0.25]),
        ("constant", 4, [0, 1, 1, 1]),
        ("linear", float("inf"), [0, 1, 1, 1]),
        ("cosine", float("inf"), [0, 1, 1, 1]),
    ],
)
def test_the_rate_follows_the_schedule_from_its_peak(
    schedule: Any,  # noqa: ANN401
    steps: float,
    shares: list[float],
) -> None:
    settings = Optimizer(learning_rate=1e-3, warmup_steps=1, schedule=schedule)
    optimizer = make_optimizer(torch.nn.Linear(4, 2), settings)
    course = make_schedule(optimizer, settings, steps)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course.step()
    assert rates == pytest.approx([1e-3 * share for share in shares])


@pytest.mark.parametrize("learning_rate", [1e-3, 3e-3])
def test_current_settings_override_a_restored_optimizer(learning_rate: float) -> None:
    before = Optimizer(learning_rate=1e-3, warmup_steps=2)
    optimizer = make_optimizer(torch.nn.Linear(4, 2), before)
    schedule = make_schedule(optimizer, before, 10)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    rate = optimizer.param_groups[0]["lr"]
    apply_settings(optimizer, schedule, Optimizer(learning_rate=learning_rate, weight_decay=0.5, warmup_steps=2))
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5
    assert group["lr"] == schedule.get_last_lr()[0] == pytest.approx(rate * (learning_rate / 1e-3))
    assert group["lr"] == rate or learning_rate != 1e-3, "to the bit where it is the same"
    assert schedule.base_lrs == [learning_rate]
    optimizer.step()
    schedule.step()
    assert group["lr"] == pytest.approx(learning_rate * 5 / 8), "the schedule continues from there"


def test_a_fit_that_is_made_longer_has_the_longer_schedule_s_rate_at_once() -> None:
    """The rate of a fit that has ended is 0, with which the first step after it would change nothing."""
    settings = Optimizer(learning_rate=1e-3, warmup_steps=0)
    optimizer = make_optimizer(torch.nn.Linear(4, 2), settings)
    ended = make_schedule(optimizer, settings, 4)
    for _ in range(4):
        optimizer.step()
        ended.step()
    assert optimizer.param_groups[0]["lr"] == 0
    schedule = make_schedule(optimizer, settings, 16)
    schedule.load_state_dict(ended.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0  # as Lightning restores it
    apply_settings(optimizer, schedule, settings)
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == pytest.approx(1e-3 * 12 / 16)
