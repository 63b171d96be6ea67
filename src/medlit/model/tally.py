"""What an evaluation has seen so far, over all its batches and, at the end, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from medlit.data.collate import EvalBatch
from medlit.data.labels import LabelSet
from medlit.evaluation.results import Results
from medlit.model.decoding import Answers
from medlit.model.metrics import Scores, SpecialtyMetrics
from medlit.model.records import gather, record


class Result(NamedTuple):
    """An evaluation's end, the same on every process.

    Attributes:
        scores: counts and what follows from them.
        answered: note by note.
        loss: mean negative log-likelihood of the supervised tokens, in nats.
    """

    scores: Scores
    answered: Results
    loss: float


class Tally:
    """Counts one evaluation.

    Args:
        label_set: the K labels.
        device: where counts are kept.
    """

    def __init__(self, label_set: LabelSet, device: torch.device) -> None:
        self.label_set = label_set
        self._metrics = SpecialtyMetrics(label_set).to(device)
        self._loss = torch.zeros(2, device=device, dtype=torch.float64)  # summed nats, supervised tokens
        self._records: list[Results] = []

    def add(self, batch: EvalBatch, answers: Answers, nats: Tensor) -> None:
        """Count a batch.

        Args:
            batch: B labelled notes.
            answers: the model's.
            nats: summed negative log-likelihood of the batch's supervised tokens, shape ().
        """
        device = self._loss.device
        self._loss += torch.stack([nats.double(), torch.full_like(nats, batch.loss.step_tokens, dtype=torch.float64)])
        self._records.append(record(batch, answers, self.label_set))
        targets = torch.tensor([self.label_set.index(name) for name in batch.specialties], device=device)
        self._metrics.update(answers.label_ids.to(device), targets)

    def result(self, summed: Callable[[Tensor], Tensor]) -> Result:
        """Put all processes' counts together.

        Args:
            summed: adds a tensor up over the processes.
        """
        nats, tokens = summed(self._loss).tolist()
        return Result(self._metrics.scores(), gather(self._records), nats / max(tokens, 1))
