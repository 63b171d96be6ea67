"""What `medlit validate` found beside its numbers: the temperature, added to the adapter that it measured."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L

from medlit.callbacks.run_folder import verb_of
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.model.adapter_metadata import AdapterMetadata, metadata_of_weights, write_temperature
from medlit.model.module import SpecialtyClassifier


class AdapterTemperature(L.Callback):
    """Adds a validation's temperature to the adapter, if all of the adapter's own validation notes were answered.

    Comes after `RunReport`: an adapter that is not this user's to write costs no number of the validation.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add, on the first process; say so where the temperature is not kept."""
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trial or verb_of(trainer) != "validate" or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, SpecialtyClassifier) or pl_module.temperature is None:
            return
        file = metadata_of_weights(trainer.ckpt_path, pl_module.adapter)
        if file is None:
            return
        reason = _against(trainer.datamodule, pl_module, file)  # type: ignore[attr-defined]
        if reason is None:
            try:
                write_temperature(file, pl_module.decoding, pl_module.temperature)
            except UserError as error:
                reason = str(error)
        if reason is not None:
            print(f"medlit: the temperature of this validation is not kept with the adapter: {reason}", file=sys.stderr)


def _against(data: TranscriptionDataModule, module: SpecialtyClassifier, file: Path) -> str | None:
    """Why a validation says too little about an adapter's temperature, or None where it says enough."""
    theirs = AdapterMetadata.read(file).data
    if data.fingerprint is None or theirs is None:
        return f"{file} does not say which notes it comes from."
    if data.fingerprint.hashes.get("validation") != theirs.hashes.get("validation"):
        return f"{file} comes from other validation notes."
    if module.results is None or len(module.results) < len(data.rows("validation")):
        return "only a part of the validation split was answered."
    return None
