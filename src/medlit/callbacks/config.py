"""The config that a verb really ran with, in the run folder."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from medlit.callbacks.folder import run_folder, verb_of
from medlit.runs import whole_file


class SaveConfig(SaveConfigCallback):
    """Writes `config_<verb>.yaml` whole; the same verb run again in the same folder replaces it."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, on the first process only."""
        text = self.parser.dump(self.config, skip_none=False)
        with whole_file(run_folder(trainer) / f"config_{verb_of(trainer)}.yaml") as path:
            path.write_text(text, encoding="utf-8")
