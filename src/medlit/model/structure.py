"""What trained weights belong to: base model, adapter shape, prompt and labels; checked at load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medlit.errors import UserError
from medlit.labels import LabelSet
from medlit.model.settings import Backbone, Lora
from medlit.prompts import PROMPT_VERSION

LABELS_FILE = "medlit.json"


@dataclass(frozen=True)
class Structure:
    """The facts without which trained weights mean nothing.

    Attributes:
        base_model: as the user named it.
        revision: of the base model on the Hub.
        lora: rank, alpha, targets and the like.
        prompt: version of the prompt.
        labels: label names, in the order of their ids.
        temperatures: way of answering -> what a validation found its log-probabilities to be divided by; not compared.
    """

    base_model: str
    revision: str | None
    lora: dict[str, Any]
    prompt: str
    labels: list[str]
    temperatures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, backbone: Backbone, lora: Lora, label_set: LabelSet, temperatures: dict[str, float] | None = None
    ) -> Structure:
        """The facts of a model."""
        names = list(label_set.names)
        shape = lora.structure()
        return cls(backbone.base_model, backbone.revision, shape, PROMPT_VERSION, names, dict(temperatures or {}))

    @classmethod
    def from_dict(cls, values: object) -> Structure:
        """Read what `to_dict` gave.

        Raises:
            UserError: it is not that.
        """
        try:
            read = cls(**values)  # type: ignore[arg-type]
            LabelSet.from_names(read.labels)
        except (TypeError, AttributeError) as error:
            raise UserError("ckpt_path: the file was not written by medlit, or by a version unknown here.") from error
        return read

    @classmethod
    def read(cls, file: Path) -> Structure:
        """Read the file that lies beside an adapter's weights.

        Raises:
            UserError: it is damaged.
        """
        try:
            values = {**json.loads(file.read_text(encoding="utf-8"))}
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise UserError(f"model.adapter: {file} is damaged; copy the adapter's folder again.") from error
        values.pop("data", None)  # which notes it was trained on: of no weight here
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint that loads without running code, and for JSON."""
        return asdict(self)


def check_structure(ours: Structure, theirs: Structure, where: str) -> None:
    """Compare a config's model with weights that are to be loaded into it.

    Args:
        ours: what the config says; without labels where the data has none.
        theirs: what the weights say.
        where: the weights, as a message names them.

    Raises:
        UserError: they do not fit, or the data has a label that the weights never learned.
    """
    for key, flag in (("base_model", "model.backbone.base_model"), ("revision", "model.backbone.revision")):
        mine, other = getattr(ours, key), getattr(theirs, key)
        if mine != other:
            raise UserError(f"{flag}: {where} belongs to {other!r} and the config says {mine!r}; set it to {other!r}.")
    for key, value in theirs.lora.items():
        mine = ours.lora.get(key)
        if mine != value:
            raise UserError(f"model.lora.{key}: {where} was trained with {value!r} and the config says {mine!r}.")
    if ours.prompt != theirs.prompt:
        raise UserError(
            f"{where} was trained with the prompt {theirs.prompt!r} and this medlit asks with {ours.prompt!r}; use the"
            " version of medlit that wrote it."
        )
    known = LabelSet(tuple(theirs.labels))
    foreign = [name for name in ours.labels if known.index(name) is None]
    if foreign:
        raise UserError(
            f"data.label_column: the data has the label {foreign[0]!r}, which {where} never learned; map it with"
            " data.labels.aliases, or train anew."
        )
