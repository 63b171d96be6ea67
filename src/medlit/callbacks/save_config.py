"""The config that a verb really ran with, in the run folder."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from medlit.atomic_io import atomic_write
from medlit.callbacks.run_folder import run_folder, verb_of


class SaveConfig(SaveConfigCallback):
    """Writes `config_<verb>.yaml` whole; the same verb run again in the same folder replaces it.

    It does so when the verb really begins: notes have been read and weights loaded, so that one which fails in either
    leaves the config of an earlier one alone.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Too early."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, on the first process; all of them ask for the folder."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            with atomic_write(folder / f"config_{stage}.yaml") as path:
                path.write_text(text, encoding="utf-8")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `config_fit.yaml`."""
        self.save_config(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `config_validate.yaml`; the validations of a fit are part of it."""
        if verb_of(trainer) == "validate":
            self.save_config(trainer, pl_module, "validate")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `config_test.yaml`."""
        self.save_config(trainer, pl_module, "test")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `config_predict.yaml`."""
        self.save_config(trainer, pl_module, "predict")
