"""Silence warnings that users cannot act on."""

from __future__ import annotations

import logging
import warnings


def silence_warnings() -> None:
    """Filter the known useless messages of Lightning and its dependencies."""
    # Unsloth gives the root logger a handler, which would print each line of Lightning's a second time.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    for message in (
        # Collating notes of a few hundred tokens takes far less time than a step.
        r"The '\w+_dataloader' does not have many workers",
        # The datamodule knows where a fit resumes, and a resumed run writes to its own folder.
        "You're resuming from a checkpoint that ended before the epoch ended",
        "Checkpoint directory .* exists and is not empty",
        # Every process has the metrics of all processes: a mean over them would change nothing.
        # https://github.com/Lightning-AI/pytorch-lightning/issues/20153
        r"It is recommended to use `self.log\('(val|test)/\w+', ..., sync_dist=True\)`",
        # Its replacement still broadcasts the buffers once.
        # https://github.com/pytorch/pytorch/pull/178054
        "`broadcast_buffers` is deprecated",
        # https://github.com/Lightning-AI/pytorch-lightning/issues/21326
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "TPU available" not in record.getMessage()
