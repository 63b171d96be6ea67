"""The resume key of `medlit predict`: an interrupted run is resumed only with the same notes, weights and settings.

Whatever leaves the answers alone may change between the two: number of devices, batch sizes, worker processes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.model.adapter_metadata import AdapterMetadata, decoding_key, metadata_of_weights
from medlit.model.settings import Decoding, LanguageModel, Lora

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 10_000  # notes
_TRAINING_ONLY = ("gradient_checkpointing", "memory_budget_gib")  # settings of the base model that change no answer


@dataclass(frozen=True)
class ResumeKey:
    """Identifies what a run of `medlit predict` answers, without any note's text.

    Attributes:
        notes: number of notes.
        notes_hash: changes with any note's id, text or tokens, and with their order.
        weights_hash: changes with the weights and with their temperature.
        settings: flag -> value of the settings that an answer depends on.
    """

    notes: int
    notes_hash: str
    weights_hash: str
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> ResumeKey | None:
        """Read what `to_dict` returned; None for anything else."""
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            return None
        return cls(**values)

    def difference(self, earlier: ResumeKey) -> str | None:
        """What has changed since an earlier run; None when nothing has.

        Settings that only one of the two knows do not count: the earlier run may be of another version of medlit.
        """
        changes = []
        if (self.notes, self.notes_hash) != (earlier.notes, earlier.notes_hash):
            changes.append("the notes have changed")
        if self.weights_hash != earlier.weights_hash:
            changes.append("the weights or their temperature have changed")
        for name in sorted(self.settings.keys() & earlier.settings.keys()):
            before, now = earlier.settings[name], self.settings[name]
            if before != now:
                changes.append(f"{name} was {json.dumps(before)} and is {json.dumps(now)}")
        return ", ".join(changes) or None


def answer_settings(
    language_model: LanguageModel, lora: Lora | None, decoding: Decoding, others: dict[str, Any]
) -> dict[str, Any]:
    """Flag -> value of the settings that an answer depends on, in JSON's types.

    Args:
        language_model: the base model.
        lora: the adapter; None: there is none.
        decoding: how the model answers.
        others: further flags.
    """
    settings = {
        f"model.language_model.{name}": value
        for name, value in asdict(language_model).items()
        if name not in _TRAINING_ONLY
    }
    settings |= {f"model.lora.{name}": value for name, value in ({} if lora is None else lora.structure()).items()}
    settings |= {f"model.decoding.{name}": value for name, value in asdict(decoding).items()}
    plain: dict[str, Any] = json.loads(json.dumps(settings | others))
    return plain


def hash_notes(rows: Dataset) -> str:
    """Hash tokenised notes, read in batches."""
    digest = hashlib.blake2b(digest_size=16)
    columns = rows.select_columns(["id", "text_hash", "length", "cut_tokens"])
    for batch in columns.iter(batch_size=_BATCH):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def hash_weights(checkpoint: str | Path | None, adapter: Path | None, decoding: Decoding) -> str:
    """Hash the trained weights and the temperature that belongs to this way of decoding.

    Args:
        checkpoint: the file, or None.
        adapter: the folder, or None.
        decoding: how the model answers.
    """
    files = [] if checkpoint is None else [Path(checkpoint)]
    files += [] if adapter is None else sorted(adapter.glob("adapter_model*"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    metadata_file = metadata_of_weights(checkpoint, None if adapter is None else str(adapter))
    if metadata_file is not None:
        temperature = AdapterMetadata.read(metadata_file).temperatures.get(decoding_key(decoding))
        digest.update(json.dumps(temperature).encode())
    return digest.hexdigest()
