"""What the progress bar shows of verbs that answer notes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Medlit


@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
def test_the_progress_bar_counts_notes_and_tells_notes_a_second(
    medlit: Medlit, run: Path, tiny_config: Path, verb: str
) -> None:
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--data.batching.eval_batch_size", "3"]
    shown = medlit(verb, *arguments, "--trainer.enable_progress_bar", "true").out
    last = [line for line in shown.replace("\r", "\n").splitlines() if "notes/s" in line][-1]
    assert "| 8/8 [" in last


@pytest.mark.parametrize(
    ("shown", "given", "bars"),
    [
        ("true", [], ["ProgressBar"]),
        ("true", ["RichProgressBar"], ["RichProgressBar"]),
        ("null", ["TQDMProgressBar"], ["TQDMProgressBar"]),
        ("false", ["RichProgressBar", "LearningRateMonitor"], []),
        ("false", [], []),
    ],
)
def test_a_progress_bar_that_the_user_names_replaces_medlit_s(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, given: list[str], bars: list[str]
) -> None:
    from lightning.pytorch.callbacks import progress

    from medlit.cli.cli import MedlitCLI

    monkeypatch.setattr(MedlitCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(tmp_path)
    added = [f"--trainer.callbacks+={name}" for name in given]
    trainer = MedlitCLI(["fit", "--config", str(tiny_config), "--trainer.enable_progress_bar", shown, *added]).trainer
    assert [type(each).__name__ for each in trainer.callbacks if isinstance(each, progress.ProgressBar)] == bars
    assert [type(each).__name__ for each in trainer.callbacks].count("LearningRateMonitor") == given.count(
        "LearningRateMonitor"
    )


def test_a_rich_progress_bar_in_a_yaml_shows_a_fit(medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    bar = tmp_path / "bar.yaml"
    bar.write_text("trainer: {enable_progress_bar: null, callbacks: {class_path: RichProgressBar}, max_steps: 1}")
    outcome = medlit("fit", "--config", tiny_config, "--config", bar, "--run_dir", tmp_path / "run")
    assert outcome.code == 0
