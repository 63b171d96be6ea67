"""Where a run's files go, and what they are called."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder, made for its owner alone; every process must ask, since the first one's answer counts for all."""
    folder = Path(str(trainer.log_dir))
    if trainer.is_global_zero:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def verb_of(trainer: L.Trainer) -> str:
    """The verb that is running: `fit`, `validate`, `test` or `predict`."""
    return "" if trainer.state.fn is None else str(trainer.state.fn.value)
