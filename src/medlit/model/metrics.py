"""What a set of answers is worth: torchmetrics' counts, and what each number means.

Label id K is an answer that is not on the list. It is a column of the confusion matrix (K true x K+1 predicted) and
counts as wrong; it is no class, so it has no F1 of its own and no part in a mean.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from medlit.data.labels import LabelSet


class ClassScores(TypedDict):
    """One specialty's scores, 0 to 1, and its number of notes."""

    precision: float
    recall: float
    f1: float
    support: int


class Scores(TypedDict):
    """What `<verb>_metrics.json` holds.

    accuracy: share of notes answered rightly. f1_macro: mean F1 of the classes that occur, in truth or in answers.
    f1_weighted: mean F1 weighted by the notes of each class. invalid_rate: share of answers not on the list. n: notes.
    confusion: notes, K rows (truth) of K+1 columns (answers, the last invalid).
    """

    accuracy: float
    f1_macro: float
    f1_weighted: float
    invalid_rate: float
    n: int
    per_class: dict[str, ClassScores]
    confusion: list[list[int]]


class SpecialtyMetrics(MetricCollection):
    """Counts answers over an epoch and all processes.

    Args:
        label_set: the K labels.
    """

    def __init__(self, label_set: LabelSet) -> None:
        k = len(label_set) + 1
        super().__init__(
            {
                # torchmetrics' default is the mean over classes, which is recall, not accuracy.
                "accuracy": MulticlassAccuracy(k, average="micro", validate_args=False),
                "precision": MulticlassPrecision(k, average="none", validate_args=False),
                "recall": MulticlassRecall(k, average="none", validate_args=False),
                "f1": MulticlassF1Score(k, average="none", validate_args=False),
                "confusion": MulticlassConfusionMatrix(k, validate_args=False),
            }
        )
        self.names = label_set.names

    def scores(self) -> Scores:
        """The numbers so far; on several processes, of all of them together."""
        values: dict[str, Tensor] = self.compute()
        counts = values["confusion"].cpu()
        k = len(self.names)
        confusion, support = counts[:k], counts[:k].sum(dim=1)
        n = int(support.sum())
        f1 = values["f1"][:k].cpu().double()
        occurs = (support > 0) | (counts[:, :k].sum(dim=0) > 0)
        return Scores(
            accuracy=float(values["accuracy"]) if n else 0.0,
            f1_macro=float(f1[occurs].mean()) if n else 0.0,
            f1_weighted=float((f1 * support).sum() / max(n, 1)),
            invalid_rate=float(confusion[:, k].sum()) / max(n, 1),
            n=n,
            per_class={
                name: ClassScores(
                    precision=float(values["precision"][i]),
                    recall=float(values["recall"][i]),
                    f1=float(f1[i]),
                    support=int(support[i]),
                )
                for i, name in enumerate(self.names)
            },
            confusion=confusion.to(torch.int64).tolist(),
        )
