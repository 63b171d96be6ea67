"""Metrics of an evaluation: torchmetrics' counts, and the results note by note, over all processes.

Label id K stands for an answer that is not one of the labels. It is a column of the confusion matrix (K true x K+1
predicted) and counts as wrong; it is not a class, so it has no F1 and no part in a mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from medlit.data.collate import EvalBatch
from medlit.data.labels import LabelSet
from medlit.evaluation.results import Results
from medlit.model.decoding import Answers


class ClassScores(TypedDict):
    """One specialty's scores, 0 to 1, and its number of notes."""

    precision: float
    recall: float
    f1: float
    support: int


class Scores(TypedDict):
    """What follows from the counts of an evaluation; part of `<verb>_metrics.json`.

    accuracy: share of correct answers. balanced_accuracy: mean recall of the classes that occur in the truth. f1_macro:
    mean F1 of the classes that occur in truth or answers. f1_weighted: mean F1 weighted by the notes of each class.
    invalid_rate: share of answers that are not a label. n: notes. confusion: notes, K rows (truth) of K+1 columns
    (answers, the last invalid).
    """

    accuracy: float
    balanced_accuracy: float
    f1_macro: float
    f1_weighted: float
    invalid_rate: float
    n: int
    per_class: dict[str, ClassScores]
    confusion: list[list[int]]


class SpecialtyMetrics(MetricCollection):
    """Counts the answers of an epoch over all processes."""

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
        """The scores so far, over all processes."""
        values: dict[str, Tensor] = self.compute()
        counts = values["confusion"].cpu()
        k = len(self.names)
        confusion, support = counts[:k], counts[:k].sum(dim=1)
        n = int(support.sum())
        f1, recall = (values[name][:k].cpu().double() for name in ("f1", "recall"))
        occurs = (support > 0) | (counts[:, :k].sum(dim=0) > 0)
        return Scores(
            accuracy=float(values["accuracy"]) if n else 0.0,
            balanced_accuracy=float(recall[support > 0].mean()) if n else 0.0,
            f1_macro=float(f1[occurs].mean()) if n else 0.0,
            f1_weighted=float((f1 * support).sum() / max(n, 1)),
            invalid_rate=float(confusion[:, k].sum()) / max(n, 1),
            n=n,
            per_class={
                name: ClassScores(
                    precision=float(values["precision"][i]),
                    recall=float(recall[i]),
                    f1=float(f1[i]),
                    support=int(support[i]),
                )
                for i, name in enumerate(self.names)
            },
            confusion=confusion.to(torch.int64).tolist(),
        )


def true_labels(batch: EvalBatch, label_set: LabelSet) -> Tensor:
    """Label ids of a batch in the model's label set, which may hold more labels than the data, (B,) on the host."""
    return _ids_in(label_set, batch.label_names)[batch.label_ids.cpu()]


def same_spelling(batch: EvalBatch, labels: Tensor, label_set: LabelSet) -> bool:
    """Whether the data spells a batch's labels as the label set does; `labels` are their ids in it, (B,)."""
    pairs = zip(labels.tolist(), batch.label_ids.tolist(), strict=True)
    return all(label_set.names[ours] == batch.label_names[theirs] for ours, theirs in pairs)


@functools.lru_cache(maxsize=4)
def _ids_in(label_set: LabelSet, names: tuple[str, ...]) -> Tensor:
    return torch.tensor([label_set.index(name) for name in names])


def batch_results(batch: EvalBatch, labels: Tensor, answers: Answers, label_set: LabelSet) -> Results:
    """Results of B notes with their true label ids, (B,); without the notes' text and the raw answers."""
    prompts, given = batch.prompts, answers.probabilities
    return Results(
        names=label_set.names,
        rows=np.array(prompts.rows),
        ids=list(prompts.ids),
        text_hashes=list(batch.text_hashes),
        truth=labels.numpy().astype(np.int64),
        answer=answers.label_ids.cpu().numpy(),
        probabilities=None if given is None else _normalised(given.double().cpu().numpy()),
        tokens=prompts.attention_mask.sum(dim=1).cpu().numpy(),
        cut_tokens=np.array(prompts.cut_tokens),
    )


def _normalised(probabilities: np.ndarray) -> np.ndarray:
    # Rows of float32 add up to 1 to seven digits only.
    rows: np.ndarray = probabilities / probabilities.sum(axis=1, keepdims=True)
    return rows


def gather_results(parts: Sequence[Results]) -> Results:
    """The results of all batches and all processes, in the order of the table, on every process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Results.join(parts)
    gathered: list[list[Results]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, list(parts))
    return Results.join([part for rank in gathered for part in rank])
