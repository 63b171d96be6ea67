"""What the module needs to know of the data before it loads weights."""

from __future__ import annotations

import lightning as L

from medlit.data.datamodule import TranscriptionDataModule
from medlit.model.adapter import adapter_folder
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata
from medlit.model.module import SpecialtyClassifier


class DataLink(L.Callback):
    """Gives the module the labels of the data, and warns where its adapter was trained with other notes.

    Lightning sets up the datamodule, then the callbacks, then the module.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Link the two; a source without labels leaves them to the weights."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, SpecialtyClassifier) or not isinstance(data, TranscriptionDataModule):
            return
        if data.label_set is not None:
            pl_module.label_set = data.label_set
        if pl_module.adapter is not None and stage != "fit" and data.fingerprint is not None and trainer.is_global_zero:
            file = adapter_folder(pl_module.adapter) / METADATA_FILE
            if file.is_file():
                data.fingerprint.warn_if_different(AdapterMetadata.read(file).data, f"the adapter {file.parent}")
