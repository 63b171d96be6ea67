"""A fit's size and the limit that ended it are reported, and its last step is validated whichever it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from compare import curves

if TYPE_CHECKING:
    from conftest import Medlit


@pytest.mark.parametrize(
    ("limits", "size", "report"),
    [
        (
            ["--trainer.max_epochs", "1"],
            "validating on 8: 3 steps, 3 steps per epoch",
            "trainer.max_epochs ended the fit after step 3, or 1.00 epochs",
        ),
        (
            ["--trainer.max_epochs", "9", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"],
            "validating on 8 (trainer.limit_val_batches: on a part of them): 2 steps, 3 steps per epoch",
            "trainer.max_steps ended the fit after step 2, or 0.67 epochs",
        ),
        (
            ["--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:01"],
            "validating on 8: 3 steps per epoch",
            "trainer.max_time ended the fit after",
        ),
    ],
)
def test_a_fit_reports_its_size_and_which_limit_ended_it(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, limits: list[str], size: str, report: str
) -> None:
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "run", *limits)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(f"medlit: training on 24 notes, {size}\n") == 1
    assert outcome.err.count(f"medlit: {report}") == 1
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "run" / "fit_metrics.json").is_file()


def test_validations_can_be_one_pass_apart(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    flags = ["--trainer.max_epochs", "3", "--val_every_steps", "null"]
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    validated = {name for name in curves(tmp_path / "run") if name.startswith("val/loss/")}
    assert validated == {"val/loss/2", "val/loss/5", "val/loss/8"}, "3 steps of 8 notes are a pass over the 24"
