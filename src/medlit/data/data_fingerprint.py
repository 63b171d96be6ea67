"""Which notes a checkpoint or an adapter comes from, and a sentence to whoever uses it with others.

Another revision of the data is no mistake, so nothing is refused; but a score on it is not the run's own, and its test
notes may be notes that were trained on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlit.data.sources import SPLITS
from medlit.errors import UserError


@dataclass(frozen=True)
class DataFingerprint:
    """Where notes came from and what they were, without any of them.

    Attributes:
        source: `data.source` as it was given.
        revision: the commit of a Hub dataset where it is known, else `data.revision`.
        hashes: split -> digits that change with any of its rows, as in `Partition.hashes`.
    """

    source: str
    revision: str | None
    hashes: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint that loads without running code, and for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> DataFingerprint | None:
        """Read what `to_dict` gave; None for anything else, as weights from elsewhere have.

        Raises:
            UserError: it has those names and other types.
        """
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            return None
        read = cls(**values)
        texts = [read.source, read.revision or ""]
        if isinstance(read.hashes, dict):
            texts += [*read.hashes, *read.hashes.values()]
        if not isinstance(read.hashes, dict) or not all(isinstance(text, str) for text in texts):
            raise UserError("ckpt_path: what the weights say of their notes is damaged; copy them again.")
        return read

    @classmethod
    def read(cls, file: Path) -> DataFingerprint | None:
        """Read the entry `data` of the file that lies beside an adapter's weights."""
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")).get("data"))

    def difference(self, theirs: DataFingerprint, where: str) -> str | None:
        """Say which splits are not those of some weights.

        Args:
            theirs: the notes that the weights come from.
            where: the weights, as a sentence names them.

        Returns:
            One sentence, or None when every split is the same, wherever it was read from.
        """
        other = [split for split in SPLITS if self.hashes.get(split) != theirs.hashes.get(split)]
        if not other:
            return None
        listed = f"{', '.join(other[:-1])} and {other[-1]} splits are" if other[1:] else f"{other[0]} split is"
        then, now = theirs._name(), self._name()
        moved = f"data.source was {then} and is {now}" if then != now else f"{now} or its data settings have changed"
        return (
            f"the {listed} not what {where} was trained with ({moved}), so that scores do not compare with its own and"
            " notes scored here may have been trained on."
        )

    def _name(self) -> str:
        return f"{self.source} at {self.revision}" if self.revision else self.source
