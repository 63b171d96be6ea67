"""Which notes a checkpoint or an adapter was trained with, and a warning where it is used with others.

Another revision of the data is not an error; but its scores do not compare with the run's own, and its test notes may
be notes that were trained on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlit.data.sources import SPLITS
from medlit.errors import UserError


@dataclass(frozen=True)
class DataFingerprint:
    """Where the notes came from and a hash of each split; no text.

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
        """Read what `to_dict` gave; None for anything else, as in weights of other tools.

        Raises:
            UserError: the names are right and a type is not.
        """
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            return None
        read = cls(**values)
        texts = [read.source, read.revision or ""]
        if isinstance(read.hashes, dict):
            texts += [*read.hashes, *read.hashes.values()]
        if not isinstance(read.hashes, dict) or not all(isinstance(text, str) for text in texts):
            raise UserError("ckpt_path: the stored data fingerprint is corrupt; copy the weights again.")
        return read

    @classmethod
    def read(cls, file: Path) -> DataFingerprint | None:
        """Read the entry `data` of an adapter's metadata file."""
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")).get("data"))

    def warn_if_different(self, theirs: DataFingerprint | None, source: str) -> None:
        """Print one line where the splits are not those that some weights were trained with.

        Args:
            theirs: the notes of the weights; None where unknown.
            source: the weights, as a message names them.
        """
        difference = None if theirs is None else self.difference(theirs, source)
        if difference is not None:
            print(f"medlit: {difference}", file=sys.stderr)

    def difference(self, theirs: DataFingerprint, source: str) -> str | None:
        """Describe which splits are not those of some weights.

        Args:
            theirs: the notes that the weights come from.
            source: the weights, as a message names them.

        Returns:
            One sentence, or None when all splits are the same, even if read from another place.
        """
        other = [split for split in SPLITS if self.hashes.get(split) != theirs.hashes.get(split)]
        if not other:
            return None
        listed = f"{', '.join(other[:-1])} and {other[-1]} splits are" if other[1:] else f"{other[0]} split is"
        then, now = theirs._name(), self._name()
        moved = f"data.source was {then} and is {now}" if then != now else f"{now} or its data settings have changed"
        return (
            f"the {listed} not what {source} was trained with ({moved}), so that scores do not compare with its own"
            " and notes scored here may have been trained on."
        )

    def _name(self) -> str:
        return f"{self.source} at {self.revision}" if self.revision else self.source
