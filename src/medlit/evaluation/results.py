"""What was answered, note by note: the record behind every number, without a word of any note.

Two systems that answered the same rows are compared pair by pair from two such records (`<verb>_answers.parquet`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medlit.atomic_io import atomic_write
from medlit.errors import UserError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """Answers to N notes with K labels, in the order of their table.

    Attributes:
        names: the K labels; position is the label id.
        rows: each note's place in its split, (N,).
        ids: each note's id, N of them.
        text_hashes: equal for notes that are the same text, N of them.
        truth: label ids, 0 .. K-1, (N,).
        answer: label ids, K where the answer is not on the list, (N,).
        probabilities: of each label, rows adding up to 1, (N, K); None where the system gives none.
        tokens: of each prompt, (N,); 0 where a system has none.
        cut_tokens: tokens cut from each transcription, (N,).
    """

    names: tuple[str, ...]
    rows: IntArray
    ids: list[str]
    text_hashes: list[str]
    truth: IntArray
    answer: IntArray
    probabilities: FloatArray | None
    tokens: IntArray
    cut_tokens: IntArray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, parts: Sequence[Results]) -> Results:
        """Put the batches of all processes together; a note that two processes had counts once."""
        rows = np.concatenate([part.rows for part in parts])
        _, first = np.unique(rows, return_index=True)
        ids = [i for part in parts for i in part.ids]
        hashes = [text for part in parts for text in part.text_hashes]
        given = [part.probabilities for part in parts]
        known = [part for part in given if part is not None]
        return cls(
            names=parts[0].names,
            rows=rows[first],
            ids=[ids[i] for i in first],
            text_hashes=[hashes[i] for i in first],
            truth=np.concatenate([part.truth for part in parts])[first],
            answer=np.concatenate([part.answer for part in parts])[first],
            probabilities=np.concatenate(known)[first] if len(known) == len(parts) else None,
            tokens=np.concatenate([part.tokens for part in parts])[first],
            cut_tokens=np.concatenate([part.cut_tokens for part in parts])[first],
        )

    @property
    def groups(self) -> IntArray:
        """Number of each note's text, (N,): what a resample draws is texts, not rows."""
        return np.unique(np.asarray(self.text_hashes, dtype=np.str_), return_inverse=True)[1].reshape(-1)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each note was answered rightly, (N,)."""
        correct: npt.NDArray[np.bool_] = self.answer == self.truth
        return correct

    @property
    def confidence(self) -> FloatArray | None:
        """Probability of the label that was answered, 0 for an answer that is none, (N,)."""
        if self.probabilities is None:
            return None
        padded = np.concatenate([self.probabilities, np.zeros((len(self), 1))], axis=1)
        confidence: FloatArray = padded[np.arange(len(self)), self.answer]
        return confidence

    def write(self, path: Path) -> None:
        """Write as Parquet; the file appears whole."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        spelled = [*self.names, None]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "text_hash": pa.array(self.text_hashes, pa.string()),
            "truth": pa.array([self.names[i] for i in self.truth], pa.string()),
            "answer": pa.array([spelled[i] for i in self.answer], pa.string()),
            "tokens": pa.array(self.tokens, pa.int64()),
            "cut_tokens": pa.array(self.cut_tokens, pa.int64()),
        }
        if self.probabilities is not None:
            columns["probabilities"] = pa.array(list(self.probabilities), pa.list_(pa.float64()))
        table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(self.names)})
        with atomic_write(path) as beside:
            pq.write_table(table, beside)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            UserError: there is no such file, or it is not medlit's.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            names = tuple(json.loads(table.schema.metadata[b"labels"]))
            place: dict[str | None, int] = {name: i for i, name in enumerate([*names, None])}
            given = table["probabilities"].to_pylist() if "probabilities" in table.column_names else None
            return cls(
                names=names,
                rows=np.arange(len(table)),
                ids=table["id"].to_pylist(),
                text_hashes=table["text_hash"].to_pylist(),
                truth=np.array([place[name] for name in table["truth"].to_pylist()], dtype=np.int64),
                answer=np.array([place[name] for name in table["answer"].to_pylist()], dtype=np.int64),
                probabilities=None if given is None else np.array(given, dtype=np.float64).reshape(len(table), -1),
                tokens=table["tokens"].to_numpy(),
                cut_tokens=table["cut_tokens"].to_numpy(),
            )
        except (OSError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(f"run: {path} is missing or damaged; run 'medlit test' for that folder again.") from error
