"""Tokenised notes as a map from whole batches to what a collator makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset as TorchDataset

from medlit.data.collate import Batch, EvalBatch, Prompts, Row
from medlit.data.prompt import Prompt
from medlit.data.samplers import MicroBatch

if TYPE_CHECKING:
    from datasets import Dataset


class BatchDataset(TorchDataset[Any]):
    """Whole batches by their row indices: the samplers choose the batch, this fetches and collates it."""

    def __init__(self, rows: Dataset, collate: Callable[..., Any]) -> None:
        self.rows = rows
        self.collate = collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch | list[int]) -> Batch | EvalBatch | Prompts:
        if isinstance(batch, MicroBatch):
            return self.collate(_as_rows(self.rows, batch.indices), batch.step_tokens)  # type: ignore[no-any-return]
        return self.collate(_as_rows(self.rows, batch))  # type: ignore[no-any-return]


def _as_rows(rows: Dataset, indices: Sequence[int]) -> list[Row]:
    columns = rows[list(indices)]
    fields = (columns[name] for name in ("id", "text_hash", "input_ids", "cut_tokens", "specialty"))
    return [
        Row(row=row, id=i, text_hash=text, input_ids=ids, cut_tokens=cut, specialty=name)
        for row, i, text, ids, cut, name in zip(indices, *fields, strict=True)
    ]


def unnamed_rows(prompts: Sequence[Prompt]) -> list[Row]:
    """Rows of notes that stand in no table: a row's name is its place."""
    return [
        Row(row=i, id=str(i), text_hash="", input_ids=one.input_ids, cut_tokens=one.cut_tokens, specialty=None)
        for i, one in enumerate(prompts)
    ]


def identity(batch: object) -> object:
    """A loader's collate function where the data set collates; by name, for worker processes."""
    return batch
