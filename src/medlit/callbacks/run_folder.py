"""Where a run's files go, and what they are called."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, which is the first to need the run folder, and makes it for its owner alone."""

    @property
    def experiment(self) -> SummaryWriter:
        """The writer; the folder is made with it, unless it is there and has the mode that its owner gave it."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            make_private(Path(self.log_dir))
        return super().experiment  # type: ignore[no-any-return]


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can read; one that is there keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder, made for its owner alone; every process must ask, since the first one's answer counts for all.

    A trial run (`fast_dev_run`), whose logger has no folder, is told where it would be; nothing is made.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        make_private(folder)
    return folder


def verb_of(trainer: L.Trainer) -> str:
    """The verb that is running: `fit`, `validate`, `test` or `predict`."""
    return "" if trainer.state.fn is None else str(trainer.state.fn.value)
