"""The run folder, and the subcommand that runs in it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger; it is the first to need the run folder, and makes it readable by its owner alone."""

    @property
    def experiment(self) -> SummaryWriter:
        """The writer."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            make_private(Path(self.log_dir))
        return super().experiment  # type: ignore[no-any-return]


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can read; an existing one keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder, made if it is missing; every process must call this, since `log_dir` is broadcast.

    A trial run (`fast_dev_run`) gets a path, but no folder.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        make_private(folder)
    return folder


def subcommand_of(trainer: L.Trainer) -> str:
    """The subcommand that is running: `fit`, `validate`, `test` or `predict`."""
    return "" if trainer.state.fn is None else str(trainer.state.fn.value)
