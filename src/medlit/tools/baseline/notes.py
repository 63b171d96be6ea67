"""The notes that baselines are fitted on and the notes that they are scored on, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.evaluation.results import FloatArray, IntArray, Results
from medlit.evaluation.uncertainty import doubt
from medlit.report.systems import System

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TestedNotes:
    """Two splits of a data module, read and not tokenised.

    Attributes:
        data: the data module.
        label_set: the training split's labels.
        train: canonical notes.
        test: canonical notes; those that the model was tested on, where there is a model.
        tokens: of each test note's prompt, (N,); 0 where no model counted them.
        cut_tokens: of each test note, (N,).
    """

    data: TranscriptionDataModule
    label_set: LabelSet
    train: Dataset
    test: Dataset
    tokens: IntArray
    cut_tokens: IntArray

    def labels(self, rows: Dataset) -> IntArray:
        """Label ids of notes."""
        place = {name: self.label_set.index(name) for name in set(rows["specialty"][:])}
        return np.array([place[name] for name in rows["specialty"][:]], dtype=np.int64)

    def system(self, name: str, probabilities: FloatArray, loss: float | None = None) -> System:
        """Score a baseline that gives each test note's K probabilities, (N, K)."""
        import torch

        from medlit.model.metrics import SpecialtyMetrics

        answered = Results(
            names=self.label_set.names,
            rows=np.arange(len(self.test)),
            ids=self.test["id"][:],
            text_hashes=self.test["text_hash"][:],
            truth=self.labels(self.test),
            answer=probabilities.argmax(axis=1),
            probabilities=probabilities,
            tokens=self.tokens,
            cut_tokens=self.cut_tokens,
        )
        counted = SpecialtyMetrics(self.label_set)
        counted.update(torch.from_numpy(answered.answer), torch.from_numpy(answered.truth))
        return System(name, {**counted.scores(), **doubt(answered), "loss": loss}, answered)


def read_notes(data: TranscriptionDataModule, tested: Results | None) -> TestedNotes:
    """Read and split as the model's verbs do.

    Args:
        data: settings.
        tested: the model's record; the baselines answer the same notes.

    Raises:
        UserError: the source cannot be used, or its test split is not what the model was tested on.
    """
    notes = data.split().notes
    if "test" not in notes:
        raise UserError(f"data.source: {data.source} has no test split; add one, or set data.split to 'grouped'.")
    train, test, label_set = notes["train"], notes["test"], data.label_set
    assert label_set is not None
    nothing = np.zeros(len(test), dtype=np.int64)
    if tested is None:
        return TestedNotes(data, label_set, train, test, nothing, nothing)
    place = {note: i for i, note in enumerate(test["id"][:])}
    if tested.names != label_set.names or not all(note in place for note in tested.ids):
        raise UserError(
            "run: the model was not tested on this test split; leave the data settings to those of the run, or test it"
            " again."
        )
    rows = test.select([place[note] for note in tested.ids])
    if rows["text_hash"][:] != tested.text_hashes:
        raise UserError("run: the notes have other texts than when the model was tested; test it again.")
    return TestedNotes(data, label_set, train, rows, tested.tokens, tested.cut_tokens)
