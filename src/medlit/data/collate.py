"""What the model is fed: the batch types with their legend, and the collators that make them.

Legend: B notes, T tokens of the longest note in the batch, S supervised tokens. Training and the loss pad on the right
(no mask is needed under causal attention, and Unsloth drops it), or do not pad at all: a packed batch lays its notes
end to end in one row, and attention is told where each begins. Generation pads on the left, so that every answer starts
in the same column. All of it happens here and explicitly: Unsloth flips the tokenizer's own `padding_side` behind one's
back.

    Batch     input_ids       [[1, 2, 3, 9, 2], [1, 4, 9, 2, 0]]
              places          [2, 3, 6, 7]              where 9, 2, 9, 2 are predicted, row after row
              targets         [9, 2, 9, 2]
    packed    input_ids       [[1, 2, 3, 9, 2, 1, 4, 9, 2]], and a filler up to a multiple of 64
              starts          [0, 5, 9, 64, 64]         the last ones are the filler's end
              positions       [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, ...]]
              places          [2, 3, 6, 7]
    Prompts   input_ids       [[1, 2, 3], [0, 1, 4]]
              attention_mask  [[1, 1, 1], [0, 1, 1]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from medlit.data.prompt import Prompt
from medlit.data.samplers import MicroBatch

if TYPE_CHECKING:
    from datasets import Dataset

# Packed tokens come in multiples of this: with odd counts a GPU's matrix products fall back to slow kernels.
MULTIPLE = 64
Tokens = TypeVar("Tokens", int, np.ndarray)


class TokenisedNote(TypedDict):
    """One tokenised note."""

    row: int
    id: str
    text_hash: str
    input_ids: list[int]
    cut_tokens: int
    specialty: str | None


class Batch(NamedTuple):
    """A micro-batch for the loss, right-padded or packed.

    What is supervised comes as places and not as a mask: to find them in a mask a GPU would have to be waited for.

    Attributes:
        input_ids: prompt and response, (B, T) int64; packed: (1, tokens).
        places: in `input_ids` row after row, the token that predicts each supervised one, (S,) int64.
        targets: the supervised tokens' ids, (S,) int64.
        lengths: tokens of each note, B of them, without padding or filler.
        step_tokens: supervised tokens in the whole optimizer step, over all its micro-batches and ranks.
        ids: the notes' ids, B of them.
        starts: packed: where each note begins and the last thing ends, int32; as many for any number of notes.
        positions: packed: each token's place in its own note, (1, tokens) int32.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    lengths: list[int]
    step_tokens: int
    ids: list[str]
    starts: Tensor | None = None
    positions: Tensor | None = None

    def padded(self) -> Batch:
        """A packed batch with its notes padded to one length instead, on the device where it is."""
        if self.positions is None:
            return self
        width, tokens = max(self.lengths), sum(self.lengths)
        note = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        cell = note.to(self.input_ids.device, non_blocking=True) * width + self.positions[0, :tokens]  # (tokens,)
        ids = self.input_ids.new_zeros(len(self.lengths) * width)
        ids[cell] = self.input_ids[0, :tokens]
        return self._replace(
            input_ids=ids.view(len(self.lengths), width), places=cell[self.places], starts=None, positions=None
        )


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

    def on(self, device: torch.device) -> Prompts:
        """The same on a device.

        Not called `to`: Lightning's loops would then take it for their own way to move a batch.
        """
        return self._replace(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


class EvalBatch(NamedTuple):
    """The same labelled notes twice: to measure the loss, and to be answered.

    Attributes:
        loss: the notes with their true answers.
        prompts: the notes alone.
        label_ids: place of each true label in `label_names`, (B,) int64.
        label_names: the data's labels.
        text_hashes: equal for notes that are the same text, B of them.
    """

    loss: Batch
    prompts: Prompts
    label_ids: Tensor
    label_names: tuple[str, ...]
    text_hashes: list[str]


def _pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Rows of one width, and 1 where a number is a row's own, both (B, T) int64."""
    lengths = np.array([len(row) for row in rows])
    width = lengths.max()
    columns = np.arange(width)
    real = columns >= width - lengths[:, None] if side == "left" else columns < lengths[:, None]
    out = np.full(real.shape, value, dtype=np.int64)
    # All at once: row by row it took a tenth of a millisecond a note, beside 4 in which a GPU answers a short one.
    out[real] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return torch.from_numpy(out), torch.from_numpy(real.astype(np.int64))


def supervised_tokens(length: Tokens, answer: Tokens, mask_prompt: bool) -> Tokens:
    """How many tokens carry loss, of one note or of N: the answer's, or all but the first, which nothing predicts.

    Args:
        length: tokens of the note with its answer.
        answer: tokens of the answer with its EOS.
        mask_prompt: whether the answer alone carries loss.
    """
    return answer if mask_prompt else length - 1


class Collator:
    """Turns rows into batches.

    Args:
        response: specialty -> token ids of the answer with its EOS.
        pad_id: token id that fills.
        mask_prompt: supervise the answer alone; otherwise every token but the first.
        label_names: the data's labels; a label's place is its id.
        most_notes: most notes of a packed batch; its `starts` are always as many, so that nothing is compiled again for
            another number of notes.
    """

    def __init__(
        self,
        response: Callable[[str], list[int]],
        pad_id: int,
        mask_prompt: bool = True,
        label_names: tuple[str, ...] = (),
        most_notes: int = 32,
    ) -> None:
        self.response = response
        self.pad_id = pad_id
        self.mask_prompt = mask_prompt
        self.label_names = label_names
        self.most_notes = most_notes
        self._label_ids = {name: label for label, name in enumerate(label_names)}
        self._answers: dict[str, list[int]] = {}

    def _answer(self, row: TokenisedNote) -> list[int]:
        specialty = row["specialty"] or ""
        if specialty not in self._answers:
            self._answers[specialty] = self.response(specialty)
        return self._answers[specialty]

    def supervised(self, row: TokenisedNote) -> int:
        """Tokens of a row that carry loss."""
        return supervised_tokens(self.length(row), len(self._answer(row)), self.mask_prompt)

    def length(self, row: TokenisedNote) -> int:
        """Tokens of a row with its answer."""
        return len(row["input_ids"]) + len(self._answer(row))

    def _supervise(self, rows: Sequence[TokenisedNote], begins: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Places and targets of B rows whose texts begin at these places."""
        places, targets = [], []
        for row, begin in zip(rows, begins, strict=True):
            supervised, length = self.supervised(row), self.length(row)
            places.append(torch.arange(begin + length - supervised - 1, begin + length - 1))
            targets.append((row["input_ids"] + self._answer(row))[length - supervised :])
        return torch.cat(places), torch.tensor([token for answer in targets for token in answer], dtype=torch.long)

    def train(self, rows: Sequence[TokenisedNote], step_tokens: int) -> Batch:
        """Right-pad prompt and response of B rows."""
        input_ids, _ = _pad([row["input_ids"] + self._answer(row) for row in rows], self.pad_id, "right")
        places, targets = self._supervise(rows, range(0, input_ids.numel(), input_ids.shape[1]))
        lengths = [self.length(row) for row in rows]
        return Batch(input_ids, places, targets, lengths, step_tokens, [row["id"] for row in rows])

    def packed(self, rows: Sequence[TokenisedNote], step_tokens: int) -> Batch:
        """Lay prompt and response of B rows end to end; the filler behind them is a note of its own."""
        lengths = [self.length(row) for row in rows]
        begins = [0, *accumulate(lengths)]
        tokens = begins[-1]
        filler = -tokens % MULTIPLE
        end = [tokens + filler] * (self.most_notes + 2 - len(begins))
        places, targets = self._supervise(rows, begins[:-1])
        texts = [token for row in rows for token in (*row["input_ids"], *self._answer(row))]
        return Batch(
            input_ids=torch.tensor([texts + [self.pad_id] * filler], dtype=torch.long),
            places=places,
            targets=targets,
            lengths=lengths,
            step_tokens=step_tokens,
            ids=[row["id"] for row in rows],
            starts=torch.tensor(begins + end, dtype=torch.int32),
            positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in (*lengths, filler)])[None],
        )

    def prompts(self, rows: Sequence[TokenisedNote]) -> Prompts:
        """Left-pad the prompts of B rows."""
        input_ids, real = _pad([row["input_ids"] for row in rows], self.pad_id, "left")
        return Prompts(
            input_ids=input_ids,
            attention_mask=real,
            rows=[row["row"] for row in rows],
            ids=[row["id"] for row in rows],
            cut_tokens=[row["cut_tokens"] for row in rows],
        )

    def evaluate(self, rows: Sequence[TokenisedNote]) -> EvalBatch:
        """Both views of B labelled rows; `step_tokens` counts this batch alone."""
        return EvalBatch(
            loss=self.train(rows, sum(map(self.supervised, rows))),
            prompts=self.prompts(rows),
            label_ids=torch.tensor([self._label_ids[row["specialty"] or ""] for row in rows]),
            label_names=self.label_names,
            text_hashes=[row["text_hash"] for row in rows],
        )


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


def _as_rows(rows: Dataset, indices: Sequence[int]) -> list[TokenisedNote]:
    columns = rows[list(indices)]
    fields = (columns[name] for name in ("id", "text_hash", "input_ids", "cut_tokens", "specialty"))
    return [
        TokenisedNote(row=row, id=i, text_hash=text, input_ids=ids, cut_tokens=cut, specialty=name)
        for row, i, text, ids, cut, name in zip(indices, *fields, strict=True)
    ]


def unnamed_rows(prompts: Sequence[Prompt]) -> list[TokenisedNote]:
    """Rows of notes that stand in no table: a row's name is its place."""
    return [
        TokenisedNote(
            row=i, id=str(i), text_hash="", input_ids=one.input_ids, cut_tokens=one.cut_tokens, specialty=None
        )
        for i, one in enumerate(prompts)
    ]


def identity(batch: object) -> object:
    """A loader's collate function where the data set collates; by name, for worker processes."""
    return batch
