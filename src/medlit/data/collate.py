"""The batch types, and the collator that makes them.

Legend: B notes, T tokens of the longest note in the batch, S supervised tokens. Training and the loss pad on the right
(no mask is needed under causal attention, and Unsloth drops it), or do not pad at all: a packed batch puts its notes
end to end in one row, and the attention gets their starts. Generation pads on the left, so that every answer starts in
the same column. Padding is explicit here because Unsloth changes the tokenizer's own `padding_side`.

    Batch     input_ids       [[1, 2, 3, 9, 2], [1, 4, 9, 2, 0]]
              places          [2, 3, 6, 7]              where 9, 2, 9, 2 are predicted, row after row
              targets         [9, 2, 9, 2]
    packed    input_ids       [[1, 2, 3, 9, 2, 1, 4, 9, 2]]
              positions       [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    Prompts   input_ids       [[1, 2, 3], [0, 1, 4]]
              attention_mask  [[1, 1, 1], [0, 1, 1]]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, takewhile
from typing import Any, Literal, NamedTuple, NotRequired, Self, TypedDict

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from medlit.data.notes import specialties_of
from medlit.data.prompt import Prompt
from medlit.data.samplers import MicroBatch
from medlit.evaluation.results import IntArray

Collate = Callable[..., Any]


class TokenisedNote(TypedDict):
    """One tokenised note."""

    row: int
    id: str
    text_hash: str
    input_ids: list[int]
    cut_tokens: int
    specialty: str | None
    specialties: NotRequired[list[str]]  # those to train on, where `specialty` is not the only one


class Batch(NamedTuple):
    """A micro-batch for the loss, right-padded or packed.

    Supervised tokens come as indices, not as a mask: `nonzero()` would synchronise with the GPU.
    """

    input_ids: Tensor  # prompt and response, (B, T) int64; packed: (1, tokens)
    places: Tensor  # in `input_ids` row after row, the token that predicts each supervised one, (S,) int64
    targets: Tensor  # the supervised tokens' ids, (S,) int64
    lengths: list[int]  # tokens of each note, B of them, without padding
    step_tokens: int  # supervised tokens in the whole optimizer step, over all its micro-batches and ranks
    ids: list[str]  # the notes' ids, B of them
    parts: int = 0  # packed: of its `SharedRow`, at least B + 2 and the same for any B; padded: 0
    positions: Tensor | None = None  # packed: each token's position in its own note, (1, tokens) int32
    shared: int = 0  # packed: tokens that all notes begin with, less than a prompt

    def padded(self) -> Self:
        """A packed batch with its notes padded instead, on the same device."""
        if self.positions is None:
            return self
        width = max(self.lengths)
        note = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        cell = note.to(self.input_ids.device, non_blocking=True) * width + self.positions[0]  # (tokens,)
        ids = self.input_ids.new_zeros(len(self.lengths) * width)
        ids[cell] = self.input_ids[0]
        rows = ids.view(len(self.lengths), width)
        return self._replace(input_ids=rows, places=cell[self.places], parts=0, positions=None, shared=0)


class Prompts(NamedTuple):
    """Left-padded prompts for an answer."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # 1 on tokens, 0 on padding, (B, T) int64
    rows: list[int]  # the notes' row numbers in their table
    ids: list[str]
    cut_tokens: list[int]  # tokens cut from each transcription

    def on(self, device: torch.device) -> Self:
        """The same on a device; not called `to`, since Lightning would call that to move a batch."""
        return self._replace(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


class EvalBatch(NamedTuple):
    """Labelled notes as training examples, for the loss, and as prompts, to be answered."""

    loss: Batch  # with their true answers
    prompts: Prompts  # alone
    label_ids: Tensor  # index of each true label in `label_names`, (B,) int64
    label_names: tuple[str, ...]
    text_hashes: list[str]
    accepted: Tensor  # of all labels of each note, its first repeated to fill the row, (B, most labels) int64


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Padded rows, and 1 where a value is not padding, both (B, T) int64."""
    lengths = np.array([len(row) for row in rows])
    width = lengths.max()
    columns = np.arange(width)
    real = columns >= width - lengths[:, None] if side == "left" else columns < lengths[:, None]
    out = np.full(real.shape, value, dtype=np.int64)
    # Row by row this took 0.1 ms per note, where a GPU answers a short one in 4.
    out[real] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return torch.from_numpy(out), torch.from_numpy(real.astype(np.int64))


@dataclass(eq=False)
class Collator:
    """Turns rows into batches."""

    response: Callable[[str], list[int]]  # specialty -> token ids of the answer with its EOS
    pad_id: int
    mask_prompt: bool = True  # supervise the answer alone; otherwise every token but the first
    label_names: tuple[str, ...] = ()  # the data's labels; a label's index is its id
    most_notes: int = 32  # of a packed batch
    _answers: dict[str, list[int]] = field(init=False, default_factory=dict)

    def _answer(self, specialty: str | None) -> list[int]:
        specialty = specialty or ""
        if specialty not in self._answers:
            self._answers[specialty] = self.response(specialty)
        return self._answers[specialty]

    def measure(self, rows: Dataset) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Tokens, supervised tokens, label and note of each example of N tokenised notes, (E,); see `samplers`."""
        specialties, prompts = specialties_of(rows), np.array(rows["length"][:])
        notes = np.repeat(np.arange(len(prompts)), [len(names) for names in specialties])
        names, labels = np.unique(list(chain.from_iterable(specialties)), return_inverse=True)
        answer = np.array([len(self._answer(str(name))) for name in names])[labels]
        lengths: IntArray = prompts[notes] + answer
        return lengths, answer if self.mask_prompt else lengths - 1, labels, notes

    def supervised(self, row: TokenisedNote) -> int:
        """Tokens of a row that carry loss: those of its answer with EOS, or all but its first."""
        return len(self._answer(row["specialty"])) if self.mask_prompt else self.length(row) - 1

    def length(self, row: TokenisedNote) -> int:
        """Tokens of a row with its answer."""
        return len(row["input_ids"]) + len(self._answer(row["specialty"]))

    def _supervise(self, rows: Sequence[TokenisedNote], begins: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Places and targets of B rows whose tokens begin at these offsets."""
        places, targets = [], []
        for row, begin in zip(rows, begins, strict=True):
            supervised, length = self.supervised(row), self.length(row)
            places.append(torch.arange(begin + length - supervised - 1, begin + length - 1))
            targets.append((row["input_ids"] + self._answer(row["specialty"]))[length - supervised :])
        return torch.cat(places), torch.tensor([token for answer in targets for token in answer], dtype=torch.long)

    def train(self, rows: Sequence[TokenisedNote], step_tokens: int) -> Batch:
        """Right-pad prompt and response of B notes."""
        input_ids, _ = pad([row["input_ids"] + self._answer(row["specialty"]) for row in rows], self.pad_id, "right")
        places, targets = self._supervise(rows, range(0, input_ids.numel(), input_ids.shape[1]))
        lengths = [self.length(row) for row in rows]
        return Batch(input_ids, places, targets, lengths, step_tokens, [row["id"] for row in rows])

    def packed(self, rows: Sequence[TokenisedNote], step_tokens: int) -> Batch:
        """Put prompt and response of B notes end to end."""
        lengths = [self.length(row) for row in rows]
        places, targets = self._supervise(rows, [0, *accumulate(lengths[:-1])])
        texts = [token for row in rows for token in (*row["input_ids"], *self._answer(row["specialty"]))]
        # The last token of a prompt is each note's own, since its answer is predicted there.
        columns = zip(*(row["input_ids"][:-1] for row in rows), strict=False)
        return Batch(
            input_ids=torch.tensor([texts], dtype=torch.long),
            places=places,
            targets=targets,
            lengths=lengths,
            step_tokens=step_tokens,
            ids=[row["id"] for row in rows],
            parts=self.most_notes + 2,
            positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])[None],
            shared=sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns)),
        )

    def prompts(self, rows: Sequence[TokenisedNote]) -> Prompts:
        """Left-pad the prompts of B rows."""
        input_ids, real = pad([row["input_ids"] for row in rows], self.pad_id, "left")
        numbers, ids = [row["row"] for row in rows], [row["id"] for row in rows]
        return Prompts(input_ids, real, numbers, ids, [row["cut_tokens"] for row in rows])

    def evaluate(self, rows: Sequence[TokenisedNote]) -> EvalBatch:
        """Both views of B labelled rows; `step_tokens` counts this batch alone."""
        known = {name: label for label, name in enumerate(self.label_names)}
        own = [[known[name] for name in row.get("specialties") or [row["specialty"] or ""]] for row in rows]
        most = max(map(len, own))
        return EvalBatch(
            loss=self.train(rows, sum(map(self.supervised, rows))),
            prompts=self.prompts(rows),
            label_ids=torch.tensor([labels[0] for labels in own]),
            label_names=self.label_names,
            text_hashes=[row["text_hash"] for row in rows],
            accepted=torch.tensor([labels + labels[:1] * (most - len(labels)) for labels in own]),
        )


@dataclass(eq=False)
class BatchDataset(TorchDataset[Any]):
    """Whole batches by their row indices: the sampler chooses them, this fetches and collates."""

    rows: Dataset
    collate: Collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch | list[int]) -> Any:  # noqa: ANN401 - what `collate` makes of them
        indices = batch.indices if isinstance(batch, MicroBatch) else batch
        columns = self.rows[indices] | {"row": indices}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not isinstance(batch, MicroBatch):
            return self.collate(rows)
        for row, place in zip(rows, batch.label_places, strict=True):
            row["specialty"] = row.get("specialties", [row["specialty"]])[place]
        return self.collate(rows, batch.step_tokens)


def unnamed_rows(prompts: Sequence[Prompt]) -> list[TokenisedNote]:
    """Rows of notes without a table: the id is the index."""
    return [
        TokenisedNote(row=i, id=str(i), text_hash="", input_ids=ids, cut_tokens=cut, specialty=None)
        for i, (ids, cut) in enumerate(prompts)
    ]
