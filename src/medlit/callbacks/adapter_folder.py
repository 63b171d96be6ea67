"""The best adapter, in PEFT's own format, beside the checkpoints."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from safetensors import SafetensorError

from medlit.atomic_io import atomic_dir
from medlit.callbacks.run_folder import run_folder, verb_of
from medlit.data.data_fingerprint import DataFingerprint
from medlit.model.adapter import save_adapter
from medlit.model.module import SpecialtyClassifier


class AdapterFolder(L.Callback):
    """Writes `adapter/` whenever a validation of a fit is better than all before it.

    No `Checkpoint`: Lightning calls those last, and a checkpoint must find this callback's new best score.

    Args:
        monitor: the metric; the same one as the best checkpoint's.
        mode: `max` where larger is better, or `min`.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"]) -> None:
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.best = float("-inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew where a fit goes on in another run folder: the best adapter so far is not there."""
        if not (run_folder(trainer) / "adapter").exists():
            self.best = float("-inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare, and write on the first process."""
        rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if rehearsal or verb_of(trainer) != "fit":
            return
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        if score > self.best:
            self.best = score
            folder = run_folder(trainer)
            if trainer.is_global_zero and isinstance(pl_module, SpecialtyClassifier):
                data = trainer.datamodule  # type: ignore[attr-defined]
                write_adapter(pl_module, folder / "adapter", data.fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, with its sign."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an earlier best."""
        self.best = state_dict["best"]


def write_adapter(module: SpecialtyClassifier, folder: Path, data: DataFingerprint | None) -> None:
    """Write an adapter folder; a reader finds every file of it whole at any moment.

    Raises:
        UserError: the disk is full or the folder closed; the adapter that was there is as it was.
    """
    with atomic_dir(folder) as beside:
        try:
            save_adapter(module.model, module.tokenizer, replace(module.metadata, data=data), beside)  # type: ignore[arg-type]
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
