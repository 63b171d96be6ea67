"""The settings of the data, grouped as `--help` and the YAML show them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from medlit.base_model import BUILTIN
from medlit.errors import UserError
from medlit.number_types import NonNegativeInt, PositiveInt

SplitKind = Literal["auto", "official", "official_clean", "grouped", "kfold"]
LabelConflicts = Literal["keep", "drop", "majority", "merge"]
ClassBalance = Literal["none", "sqrt", "inverse"]


@dataclass(frozen=True)
class Columns:
    """Names of the table's columns.

    Attributes:
        text: the transcription.
        label: the specialty; null where the table has no labels.
        id: names a note in predictions and reports; null: the column 'id' if there is one, else a hash of the text;
            'none': a hash of the text.
    """

    text: str = "transcription"
    label: str | None = "medical_specialty"
    id: str | None = None

    def of(self, names: Collection[str]) -> dict[str, str | None]:
        """Setting -> the column that it means in a table with these columns; None for no column."""
        identity = None if self.id == "none" or (self.id is None and "id" not in names) else self.id or "id"
        return {"text": self.text, "label": self.label, "id": identity}

    def unfit(self, key: str, table: str, fault: str) -> str:
        """The message for a column that cannot be used."""
        name = self.of(("id",))[key]
        other = " or, for hashes of the texts, 'none'" if key == "id" else ""
        return f"data.columns.{key}: column {name!r} of {table} {fault}; name another column{other}."


@dataclass
class Labels:
    """How labels are spelled and which are used; applied in this order.

    Attributes:
        separator: separates labels in a cell, such as ';'; null: one label.
        aliases: label in the table: label to use, such as {"Neuro": "Neurology"}.
        drop: labels whose rows are left out.
        min_count: leave out labels with fewer rows in the source.
    """

    separator: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    min_count: NonNegativeInt = 1

    def __post_init__(self) -> None:
        if self.separator is not None and not self.separator.strip():
            raise UserError("data.labels.separator: must be a mark such as ';'; leave it out if cells hold one label.")
        for name in self.aliases:  # of a mapping jsonargparse checks the values alone
            if not isinstance(name, str):
                raise UserError(f"data.labels.aliases: {name!r} is not text in YAML; put what the table has in quotes.")


@dataclass(frozen=True)
class Split:
    """How notes are divided into train, validation and test.

    Attributes:
        kind: 'official' uses the source's own splits; 'official_clean' does too, without the training rows whose text
            also occurs in validation or test; 'grouped' divides one table so that no text is in two splits, stratified
            by label; 'kfold' makes folds in the same way: one is test, the next one validation, the others train;
            'auto' is 'official' where the source has splits (a missing validation or test split is taken from
            train), else 'grouped'.
        shares: shares of train, validation and test for 'grouped'.
        seed: seed of 'grouped' and 'kfold'.
        folds: number of folds for 'kfold', at least 3.
        fold: the fold that is the test split, 0 .. folds - 1.
        near_threshold: where rows are drawn, or left out by 'official_clean', texts with words this similar (Jaccard,
            over 0, to 1) count as one; null: identical texts only.
    """

    kind: SplitKind = "auto"
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: NonNegativeInt = 3407
    folds: int = 5
    fold: int = 0
    near_threshold: float | None = None

    def __post_init__(self) -> None:
        if len(self.shares) != 3 or min(self.shares) < 0 or self.shares[0] <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            fault = f"train, validation and test need three shares that add up to 1, not {list(self.shares)}"
            raise UserError(f"data.split.shares: {fault}; for example [0.8, 0.1, 0.1].")
        if self.folds < 3 or not 0 <= self.fold < self.folds:
            given = f"{self.fold} of {self.folds}"
            raise UserError(f"data.split.fold: choose at least 3 folds, and one from 0 to folds - 1, not {given}.")
        if self.near_threshold is not None and not 0 < self.near_threshold <= 1:
            raise UserError(f"data.split.near_threshold: must be in (0, 1] or null, not {self.near_threshold}.")


@dataclass(frozen=True)
class Batching:
    """How notes are put into batches.

    Attributes:
        global_batch_size: notes per optimizer step, over all devices.
        micro_batch_size: mean number of notes in a micro-batch on one device; gradients are accumulated up to
            global_batch_size.
        eval_batch_size: maximum notes in an evaluation batch on one device.
        token_budget: maximum number of tokens in a batch on one device, padding included. Packed notes, and those of
            several devices, are divided equally instead, and a step of few micro-batches may exceed it. null:
            micro_batch_size x max_length; in evaluation a quarter of eval_batch_size x max_length, since most notes
            are much shorter.
        packing: put the notes of a training micro-batch end to end instead of padding them; null: where the attention
            supports it (docs/hardware.md).
        class_balance: 'none' trains on every note once per epoch; 'sqrt' and 'inverse' draw rare specialties more
            often: in proportion to the square root of their notes, or all equally often.
        num_workers: processes that prepare batches; 0: the main one.
        seed: seed of the training shuffle.
    """

    global_batch_size: PositiveInt = 32
    micro_batch_size: PositiveInt = 8
    eval_batch_size: PositiveInt = 32
    token_budget: PositiveInt | None = None
    packing: bool | None = None
    class_balance: ClassBalance = "none"
    num_workers: NonNegativeInt = 0
    seed: NonNegativeInt = 3407


@dataclass(frozen=True)
class Predict:
    """What `medlit predict` classifies.

    Attributes:
        text: one note; '-' reads it from standard input.
        source: a split ('train', 'validation', 'test'), or any source as for data.source; labels are not needed.
    """

    text: str | None = None
    source: str = "test"


@dataclass(frozen=True)
class Tokenizer:
    """The base model's tokenizer and its length limit; set from model.language_model, not from the data's settings."""

    base_model: str = BUILTIN
    revision: str | None = None
    max_length: int = 2048  # maximum number of tokens in prompt and answer together
