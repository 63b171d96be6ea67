"""The best adapter, in PEFT's own format, beside the checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import lightning as L

from medlit.callbacks.folder import run_folder, verb_of
from medlit.model.module import SpecialtyClassifier
from medlit.model.temperature import keep_temperatures, measured_adapter


class AdapterFolder(L.Callback):
    """Writes `adapter/` whenever a validation of a fit is better than all before it; `validate` adds its temperature.

    No `Checkpoint`: Lightning calls those last, and a checkpoint must find this callback's new best score.

    Args:
        monitor: the metric; the same one as the best checkpoint's.
        mode: `max` where larger is better, or `min`.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"]) -> None:
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.best = float("-inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare, and write on the first process."""
        if verb_of(trainer) == "validate" and isinstance(pl_module, SpecialtyClassifier):
            self._keep_temperature(trainer, pl_module)
        rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if rehearsal or verb_of(trainer) != "fit":
            return
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        if score > self.best:
            self.best = score
            folder = run_folder(trainer)
            if trainer.is_global_zero and isinstance(pl_module, SpecialtyClassifier):
                write_adapter(pl_module, folder / "adapter")

    def _keep_temperature(self, trainer: L.Trainer, module: SpecialtyClassifier) -> None:
        file = measured_adapter(trainer.ckpt_path, module.adapter)
        if trainer.is_global_zero and file is not None and module.temperature is not None:
            keep_temperatures(file, module.temperatures)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, with its sign."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an earlier best."""
        self.best = state_dict["best"]


def write_adapter(module: SpecialtyClassifier, folder: Path) -> None:
    """Write an adapter folder beside its place, then swap it in; a reader finds the old one or the new, never half."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder.parent))
    old = beside.with_name(beside.name + "-old")
    try:
        module.save_adapter(beside)
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
