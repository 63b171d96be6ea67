"""What Lightning and its neighbours say that nobody can act on, left unsaid."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Leave on the screen what a user can act on."""
    # Unsloth gives the root logger a handler; without this every line of Lightning's is printed twice.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    for message in (
        # Notes of a few hundred tokens are collated in far less time than a step takes.
        r"The '\w+_dataloader' does not have many workers",
        # The data module knows where a fit goes on, and the files of a run that goes on are its own.
        "You're resuming from a checkpoint that ended before the epoch ended",
        "Checkpoint directory .* exists and is not empty",
        # Every process has counted everybody's answers by then: a mean over them would change nothing.
        # https://github.com/Lightning-AI/pytorch-lightning/issues/20153
        r"It is recommended to use `self.log\('(val|test)/\w+', ..., sync_dist=True\)`",
        # Its replacement still sends the buffers once; until there is one that does not, the old name is to be kept.
        # https://github.com/pytorch/pytorch/pull/178054
        "`broadcast_buffers` is deprecated",
        # https://github.com/Lightning-AI/pytorch-lightning/issues/21326
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "TPU available" not in record.getMessage()
