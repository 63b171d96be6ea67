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
