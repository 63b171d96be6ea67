"""What trained weights belong to: base model, adapter shape, prompt, instruction and labels; checked at load."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medlit.data.labels import LabelSet
from medlit.data.prompt import INSTRUCTION, KEEPS, PROMPT_VERSION, Keep
from medlit.errors import UserError
from medlit.model.conditions import KEY
from medlit.model.settings import LanguageModel, Lora

LABELS_FILE = "medlit.json"


@dataclass(frozen=True)
class AdapterMetadata:
    """The facts without which trained weights mean nothing.

    Attributes:
        base_model: as the user named it.
        revision: of the base model on the Hub.
        lora: rank, alpha, targets and the like.
        prompt: version of the prompt.
        labels: label names, in the order of their ids.
        temperatures: way of answering -> what a validation found its log-probabilities to be divided by; not compared.
        instruction: what the model is told to do; None in a file that does not say, and then not compared.
        keep: what stays of a note that is too long; a file that does not say is of a time that knew 'head' only.
    """

    base_model: str
    revision: str | None
    lora: dict[str, Any]
    prompt: str
    labels: list[str]
    temperatures: dict[str, float] = field(default_factory=dict)
    instruction: str | None = None
    keep: Keep = "head"

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        lora: Lora,
        label_set: LabelSet,
        temperatures: dict[str, float] | None = None,
        instruction: str = INSTRUCTION,
        keep: Keep = "head",
    ) -> AdapterMetadata:
        """The facts of a model."""
        return cls(
            base_model=language_model.base_model,
            revision=language_model.revision,
            lora=lora.structure(),
            prompt=PROMPT_VERSION,
            labels=list(label_set.names),
            temperatures=dict(temperatures or {}),
            instruction=instruction,
            keep=keep,
        )

    @classmethod
    def from_dict(cls, values: object) -> AdapterMetadata:
        """Read what `to_dict` gave.

        Raises:
            UserError: it is not that.
        """
        strange = UserError("ckpt_path: the file was not written by medlit, or by a version unknown here.")
        try:
            read = cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise strange from error
        if not read._typed():
            raise strange
        LabelSet.from_names(read.labels)
        return read

    def _typed(self) -> bool:
        """Whether every value is of the type that it has in a file of medlit's."""
        texts = [self.base_model, self.prompt]
        optional = [self.revision, self.instruction]
        groups = isinstance(self.lora, dict) and isinstance(self.labels, list) and isinstance(self.temperatures, dict)
        return (
            groups
            and self.keep in KEEPS
            and all(isinstance(text, str) for text in [*texts, *self.lora, *self.labels, *self.temperatures])
            and all(text is None or isinstance(text, str) for text in optional)
            and all(isinstance(t, int | float) and 0 < t < math.inf for t in self.temperatures.values())
        )

    @classmethod
    def read(cls, file: Path) -> AdapterMetadata:
        """Read the file that lies beside an adapter's weights.

        Raises:
            UserError: it is damaged.
        """
        try:
            values = {**json.loads(file.read_text(encoding="utf-8"))}
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            raise UserError(f"model.adapter: {file} is damaged; copy the adapter's folder again.") from error
        # Which notes it was trained on, and under what limits: of no weight here.
        values.pop("data", None)
        values.pop(KEY, None)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint that loads without running code, and for JSON."""
        return asdict(self)


def check_metadata(ours: AdapterMetadata, theirs: AdapterMetadata, where: str) -> None:
    """Compare a config's model with weights that are to be loaded into it.

    Args:
        ours: what the config says; without labels where the data has none.
        theirs: what the weights say.
        where: the weights, as a message names them.

    Raises:
        UserError: they do not fit, or the data has a label that the weights never learned.
    """
    for key, flag in (("base_model", "model.language_model.base_model"), ("revision", "model.language_model.revision")):
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
    if theirs.instruction not in (None, ours.instruction):
        raise UserError(
            f"data.instruction: {where} was trained with {theirs.instruction!r} and the config says"
            f" {ours.instruction!r}; set it to the former."
        )
    if ours.keep != theirs.keep:
        raise UserError(
            f"data.keep: {where} was trained with {theirs.keep!r} and the config says {ours.keep!r}; set it to"
            f" {theirs.keep!r}."
        )
    known = LabelSet(tuple(theirs.labels))
    foreign = [name for name in ours.labels if known.index(name) is None]
    if foreign:
        raise UserError(
            f"data.columns.label: the data has the label {foreign[0]!r}, which {where} never learned; map it with"
            " data.labels.aliases, or train anew."
        )
