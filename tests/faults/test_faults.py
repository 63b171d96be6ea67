"""A few of the kills of `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_fit_that_is_killed_loses_nothing(llama: Path, notes_folder: Path, tmp_path: Path) -> None:
    from faults.harness import Harness

    assert Harness(tmp_path, llama, notes_folder, seed=1).kill(4) == 4
