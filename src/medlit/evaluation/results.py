"""`Results`: one evaluation note by note, without the notes' text.

Every score of an evaluation follows from it, and two systems that answered the same notes are compared pairwise by
their two files, `<stage>_answers.parquet`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medlit.atomic_io import atomic_write
from medlit.errors import UserError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_ARRAYS, _LISTS = ("rows", "truth", "answer", "tokens", "cut_tokens"), ("ids", "text_hashes", "accepted")


@dataclass(frozen=True)
class Results:
    """Answers to N notes with K labels, in the order of their table."""

    names: tuple[str, ...]  # the K labels; the position is the label id
    rows: IntArray  # each note's position in its split, (N,)
    ids: list[str]  # each note's id, N of them
    text_hashes: list[str]  # equal for notes with the same text, N of them
    truth: IntArray  # label ids, 0 .. K-1, (N,)
    answer: IntArray  # label ids, K for an invalid answer, (N,)
    probabilities: FloatArray | None  # of each label, rows sum to 1, (N, K); None if the system gives none
    tokens: IntArray  # in each prompt, (N,); 0 if the system counts none
    cut_tokens: IntArray  # cut from each transcription, (N,)
    accepted: list[list[int]]  # all label ids of each note, its `truth` first, N of them

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Join the batches of all processes by row; a note that two processes had counts once."""
        given = [part.probabilities for part in parts if part.probabilities is not None]
        values: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        values |= {name: [value for part in parts for value in getattr(part, name)] for name in _LISTS}
        joined = replace(parts[0], **values, probabilities=np.concatenate(given) if len(given) == len(parts) else None)
        return joined.select(np.unique(joined.rows, return_index=True)[1])

    def select(self, positions: IntArray) -> Self:
        """The notes at these positions, in this order."""
        values: dict[str, Any] = {name: getattr(self, name)[positions] for name in _ARRAYS}
        values |= {name: [getattr(self, name)[i] for i in positions] for name in _LISTS}
        values["probabilities"] = None if self.probabilities is None else self.probabilities[positions]
        return replace(self, **values)

    @property
    def label_mask(self) -> BoolArray:
        """Whether each label is one of the note's, (N, K)."""
        mask = np.zeros((len(self), len(self.names)), dtype=np.bool_)
        for note, own in enumerate(self.accepted):
            mask[note, own] = True
        return mask

    @property
    def by_length(self) -> list[IntArray]:
        """Indices of the notes from short to long prompts, in up to six bins of about equally many, equals together."""
        order = np.argsort(self.tokens, kind="stable")
        starts = [self.tokens[part[0]] for part in np.array_split(order, 6)[1:] if len(part)]
        return [part for part in np.split(order, np.searchsorted(self.tokens[order], starts)) if len(part)]

    @property
    def any_of(self) -> BoolArray:
        """Whether each answer is one of the note's labels, (N,)."""
        pairs = zip(self.answer.tolist(), self.accepted, strict=True)
        return np.array([answer in own for answer, own in pairs], dtype=np.bool_)

    @property
    def groups(self) -> IntArray:
        """Number of each note's text, (N,); the bootstrap draws texts, not rows."""
        return np.unique(np.asarray(self.text_hashes, dtype=np.str_), return_inverse=True)[1]

    @property
    def correct(self) -> BoolArray:
        """Whether each answer is the true label, (N,)."""
        return np.asarray(self.answer == self.truth)

    @property
    def confidence(self) -> FloatArray | None:
        """Probability of each answer, 0 for an invalid one, (N,)."""
        if self.probabilities is None:
            return None
        k = len(self.names)
        return np.where(self.answer < k, self.probabilities[np.arange(len(self)), np.minimum(self.answer, k - 1)], 0.0)

    @property
    def errors(self) -> tuple[IntArray, IntArray, IntArray]:
        """True label, answer and number of notes of every error but invalid answers, the most frequent first."""
        wrong = ~self.correct & (self.answer < len(self.names))
        pairs, notes = np.unique([self.truth[wrong], self.answer[wrong]], axis=1, return_counts=True)
        order = np.argsort(-notes, kind="stable")
        return pairs[0, order], pairs[1, order], notes[order]

    def write(self, path: Path) -> None:
        """Write a Parquet file atomically."""
        names = [*self.names, None]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "text_hash": pa.array(self.text_hashes, pa.string()),
            "truth": pa.array([names[i] for i in self.truth], pa.string()),
            "answer": pa.array([names[i] for i in self.answer], pa.string()),
            "tokens": pa.array(self.tokens, pa.int64()),
            "cut_tokens": pa.array(self.cut_tokens, pa.int64()),
        }
        if any(len(own) > 1 for own in self.accepted):
            own = [[names[label] for label in labels] for labels in self.accepted]
            columns["labels"] = pa.array(own, pa.list_(pa.string()))
        if self.probabilities is not None:
            ends = np.arange(len(self) + 1, dtype=np.int32) * len(self.names)
            columns["probabilities"] = pa.ListArray.from_arrays(ends, self.probabilities.ravel())
        with atomic_write(path) as partial:
            pq.write_table(pa.table(columns).replace_schema_metadata({"labels": json.dumps(self.names)}), partial)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote; a UserError if it is missing or another file."""
        try:
            table = pq.read_table(path)
            names = tuple(json.loads(table.schema.metadata[b"labels"]))
            label_ids: dict[str | None, int] = {name: i for i, name in enumerate([*names, None])}
            truth = table["truth"].to_pylist()
            own = table["labels"].to_pylist() if "labels" in table.column_names else [[name] for name in truth]
            given = table["probabilities"].combine_chunks().flatten() if "probabilities" in table.column_names else None
            return cls(
                names=names,
                rows=np.arange(len(table)),
                ids=table["id"].to_pylist(),
                text_hashes=table["text_hash"].to_pylist(),
                truth=np.array([label_ids[name] for name in truth], dtype=np.int64),
                answer=np.array([label_ids[name] for name in table["answer"].to_pylist()], dtype=np.int64),
                probabilities=None if given is None else given.to_numpy().reshape(len(table), len(names)),
                tokens=table["tokens"].to_numpy(),
                cut_tokens=table["cut_tokens"].to_numpy(),
                accepted=[[label_ids[name] for name in labels] for labels in own],
            )
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise UserError(f"run_dir: {path} is missing or damaged; run 'medlit test' in that folder.") from error
