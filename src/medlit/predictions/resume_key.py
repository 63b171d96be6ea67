"""What a run of `medlit predict` asked of what: an interrupted one goes on only if that is the same.

What decides no answer may change between the two: number of devices, batch sizes, worker processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.model.adapter_metadata import AdapterMetadata, decoding_key, metadata_of_weights
from medlit.model.settings import Decoding, LanguageModel, Lora

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 10_000  # notes
_NO_ANSWER = ("gradient_checkpointing", "memory_budget_gib")  # settings of the base model that decide how it trains


@dataclass(frozen=True)
class Origin:
    """Where a table's answers come from, without a word of any note.

    Attributes:
        notes: how many.
        notes_hash: digits that change with any note's id or text, with its tokens, and with their order.
        weights_hash: digits that change with the weights and with their temperature.
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
    def from_dict(cls, values: dict[str, Any]) -> Origin | None:
        """Read what `to_dict` gave; None for anything else."""
        return cls(**values) if values.keys() == cls.__dataclass_fields__.keys() else None

    def difference(self, other: Origin) -> str | None:
        """Say what is not as it was in another run; None when everything is."""
        found = []
        if (self.notes, self.notes_hash) != (other.notes, other.notes_hash):
            found.append("the notes are others")
        if self.weights_hash != other.weights_hash:
            found.append("the weights or their temperature are others")
        for name in sorted(self.settings.keys() | other.settings.keys()):
            then, now = other.settings.get(name), self.settings.get(name)
            if then != now:
                found.append(f"{name} was {json.dumps(then)} and is {json.dumps(now)}")
        return ", ".join(found) or None


def settings_of(
    language_model: LanguageModel, lora: Lora | None, decoding: Decoding, others: dict[str, Any]
) -> dict[str, Any]:
    """Flag -> value, in the types that JSON gives back.

    Args:
        language_model: the base model.
        lora: the adapter's shape.
        decoding: the way of answering.
        others: further flags.
    """
    found = {
        f"model.language_model.{name}": value
        for name, value in asdict(language_model).items()
        if name not in _NO_ANSWER
    }
    found |= {f"model.lora.{name}": value for name, value in ({} if lora is None else lora.structure()).items()}
    found |= {f"model.decoding.{name}": value for name, value in asdict(decoding).items()}
    plain: dict[str, Any] = json.loads(json.dumps(found | others))
    return plain


def hash_notes(rows: Dataset) -> str:
    """Digits of tokenised notes, read in batches."""
    digest = hashlib.blake2b(digest_size=16)
    columns = rows.select_columns(["id", "text_hash", "length", "cut_tokens"])
    for batch in columns.iter(batch_size=_BATCH):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def hash_weights(checkpoint: str | Path | None, adapter: Path | None, decoding: Decoding) -> str:
    """Digits of the trained weights that answer, and of the temperature that belongs to this way of answering.

    Args:
        checkpoint: the file, or None.
        adapter: the folder, or None.
        decoding: the way of answering.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in _weight_files(checkpoint, adapter):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    measured = metadata_of_weights(checkpoint, None if adapter is None else str(adapter))
    if measured is not None:
        temperature = AdapterMetadata.read(measured).temperatures.get(decoding_key(decoding))
        digest.update(json.dumps(temperature).encode())
    return digest.hexdigest()


def _weight_files(checkpoint: str | Path | None, adapter: Path | None) -> Iterable[Path]:
    if checkpoint is not None:
        yield Path(checkpoint)
    if adapter is not None:
        yield from sorted(adapter.glob("adapter_model*"))
