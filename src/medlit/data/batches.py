"""What the model is fed: the batch types with their legend, and the collators that make them.

Legend: B notes, T tokens of the longest note in the batch, K labels. Training and the loss pad on the right (no mask is
needed under causal attention, and Unsloth drops it); generation pads on the left, so that every answer starts in the
same column. Both pad here and explicitly: Unsloth flips the tokenizer's own `padding_side` behind one's back.

    Batch     input_ids       [[1, 2, 3, 9, 2], [1, 4, 9, 2, 0]]
              labels          [[-100, -100, -100, 9, 2], [-100, -100, 9, 2, -100]]
    Prompts   input_ids       [[1, 2, 3], [0, 1, 4]]
              attention_mask  [[1, 1, 1], [0, 1, 1]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

IGNORE = -100
LossOn = Literal["response", "whole"]


class Row(TypedDict):
    """One tokenised note."""

    row: int
    id: str
    text_hash: str
    input_ids: list[int]
    cut_tokens: int
    specialty: str | None


class Batch(NamedTuple):
    """A right-padded micro-batch for the loss.

    Attributes:
        input_ids: prompt and response, (B, T) int64.
        labels: the ids to be predicted, `IGNORE` elsewhere, (B, T) int64.
        lengths: tokens of each note, B of them.
        step_tokens: supervised tokens in the whole optimizer step, over all its micro-batches and ranks.
        ids: the notes' ids, B of them.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: list[int]
    step_tokens: int
    ids: list[str]


class Prompts(NamedTuple):
    """Left-padded prompts for an answer.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: 1 on tokens, 0 on padding, (B, T) int64.
        rows: the notes' places in their table, B of them.
        ids: the notes' ids, B of them.
        cut_tokens: tokens cut from each transcription, B of them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: list[int]
    ids: list[str]
    cut_tokens: list[int]


class EvalBatch(NamedTuple):
    """The same labelled notes twice: to measure the loss, and to be answered.

    Attributes:
        loss: the notes with their true answers.
        prompts: the notes alone.
        specialties: the true answers as text, B of them.
        text_hashes: equal for notes that are the same text, B of them.
    """

    loss: Batch
    prompts: Prompts
    specialties: list[str]
    text_hashes: list[str]


def _pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        out[i, place] = torch.tensor(row, dtype=torch.long)
    return out


class Collator:
    """Turns rows into batches.

    Args:
        response: specialty -> token ids of the answer with its EOS.
        pad_id: token id that fills.
        loss_on: `response` supervises the answer alone, `whole` every token but the first.
    """

    def __init__(self, response: Callable[[str], list[int]], pad_id: int, loss_on: LossOn) -> None:
        self.response = response
        self.pad_id = pad_id
        self.loss_on = loss_on
        self._answers: dict[str, list[int]] = {}

    def _answer(self, row: Row) -> list[int]:
        specialty = row["specialty"] or ""
        if specialty not in self._answers:
            self._answers[specialty] = self.response(specialty)
        return self._answers[specialty]

    def supervised(self, row: Row) -> int:
        """Tokens of a row that carry loss."""
        answer = len(self._answer(row))
        return answer if self.loss_on == "response" else len(row["input_ids"]) + answer - 1

    def length(self, row: Row) -> int:
        """Tokens of a row with its answer."""
        return len(row["input_ids"]) + len(self._answer(row))

    def train(self, rows: Sequence[Row], step_tokens: int) -> Batch:
        """Right-pad prompt and response of B rows."""
        texts = [row["input_ids"] + self._answer(row) for row in rows]
        labels = (
            [[IGNORE] * len(row["input_ids"]) + self._answer(row) for row in rows]
            if self.loss_on == "response"
            # The first token is predicted from nothing: no loss there.
            else [[IGNORE, *text[1:]] for text in texts]
        )
        return Batch(
            input_ids=_pad(texts, self.pad_id, "right"),
            labels=_pad(labels, IGNORE, "right"),
            lengths=[len(text) for text in texts],
            step_tokens=step_tokens,
            ids=[row["id"] for row in rows],
        )

    def prompts(self, rows: Sequence[Row]) -> Prompts:
        """Left-pad the prompts of B rows."""
        return Prompts(
            input_ids=_pad([row["input_ids"] for row in rows], self.pad_id, "left"),
            attention_mask=_pad([[1] * len(row["input_ids"]) for row in rows], 0, "left"),
            rows=[row["row"] for row in rows],
            ids=[row["id"] for row in rows],
            cut_tokens=[row["cut_tokens"] for row in rows],
        )

    def evaluate(self, rows: Sequence[Row]) -> EvalBatch:
        """Both views of B labelled rows; `step_tokens` counts this batch alone."""
        return EvalBatch(
            loss=self.train(rows, sum(map(self.supervised, rows))),
            prompts=self.prompts(rows),
            specialties=[row["specialty"] or "" for row in rows],
            text_hashes=[row["text_hash"] for row in rows],
        )
