"""Metrics of an evaluation: counts by label, and the results note by note, over all processes.

Label id K stands for an answer that is not one of the labels. It is a column of the confusion matrix (K true x K+1
predicted) and counts as wrong; it is not a class, so it has no F1 and no part in a mean.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from medlit.data.collate import EvalBatch
from medlit.data.labels import LabelSet
from medlit.evaluation.results import Results
from medlit.model.decoding import Answers

_MOST_IN_MATRIX = 500  # a confusion matrix of 5,000 labels has 25 million cells, nearly all of them 0
Scores = dict[str, Any]  # as `SpecialtyMetrics.scores` gives them


class SpecialtyMetrics(Metric):
    """Counts the answers of an epoch over all processes; memory and time grow with K, not with its square."""

    correct: Tensor  # notes by label, (K + 1,)
    true: Tensor
    answered: Tensor
    any_of: Tensor  # notes of which any label is answered, ()
    several: Tensor  # notes with several labels, ()
    confusion: Tensor  # (K + 1, K + 1), or empty

    def __init__(self, label_set: LabelSet) -> None:
        super().__init__()
        self.names = label_set.names
        self.size = len(label_set) + 1
        side = self.size if len(label_set) <= _MOST_IN_MATRIX else 0
        for name in ("correct", "true", "answered"):
            self.add_state(name, torch.zeros(self.size, dtype=torch.int64), "sum")
        for name in ("any_of", "several"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("confusion", torch.zeros(side, side, dtype=torch.int64), "sum")

    def update(self, answers: Tensor, truth: Tensor, accepted: Tensor | None = None) -> None:
        """Count B answers, (B,) int64; a note's labels are `accepted`, as in `EvalBatch`; None: the first alone."""
        accepted = truth[:, None] if accepted is None else accepted
        self.any_of += (answers[:, None] == accepted).any(dim=1).sum()
        self.several += (accepted != truth[:, None]).any(dim=1).sum()
        self.correct += torch.bincount(truth[answers == truth], minlength=self.size)
        self.true += torch.bincount(truth, minlength=self.size)
        self.answered += torch.bincount(answers, minlength=self.size)
        if len(self.confusion):
            cells = torch.bincount(truth * self.size + answers, minlength=self.size**2)
            self.confusion += cells.view(self.size, self.size)

    def compute(self) -> dict[str, Tensor]:
        """The counts over all processes."""
        return {name: getattr(self, name) for name in self._defaults}

    def scores(self) -> Scores:
        """The scores so far, over all processes; part of `<verb>_metrics.json`.

        accuracy: share of correct answers. any_of_accuracy: of answers that are one of the note's labels, of which the
        other numbers use the first. several_labels: notes with more than one. balanced_accuracy: mean recall of the
        classes that occur in the truth. f1_macro: mean F1 of those that occur in truth or answers, f1_weighted weighted
        by their notes. invalid_rate: share of answers that are not a label. n: notes. per_class: of each label, with
        `support`, notes. confusion: notes, K rows (truth) of K+1 columns (answers, the last invalid); None over
        500 labels.
        """
        counts: dict[str, np.ndarray] = {name: count.cpu().numpy() for name, count in self.compute().items()}
        k = len(self.names)
        correct, support, answered = (counts[name][:k] for name in ("correct", "true", "answered"))
        n = int(support.sum())
        precision, recall = correct / np.maximum(answered, 1), correct / np.maximum(support, 1)
        f1 = 2 * correct / np.maximum(support + answered, 1)
        occurs, rates = support + answered > 0, np.stack([precision, recall, f1], axis=1).tolist()
        return Scores(
            accuracy=float(correct.sum() / max(n, 1)),
            any_of_accuracy=float(counts["any_of"] / max(n, 1)),
            several_labels=int(counts["several"]),
            balanced_accuracy=float(recall[support > 0].mean()) if n else 0.0,
            f1_macro=float(f1[occurs].mean()) if n else 0.0,
            f1_weighted=float((f1 * support).sum() / max(n, 1)),
            invalid_rate=float(counts["answered"][k] / max(n, 1)),
            n=n,
            per_class={
                name: {"precision": one[0], "recall": one[1], "f1": one[2], "support": int(notes)}
                for name, one, notes in zip(self.names, rates, support, strict=True)
            },
            confusion=counts["confusion"][:k].tolist() if k <= _MOST_IN_MATRIX else None,
        )


def label_ids(batch: EvalBatch, label_set: LabelSet) -> Tensor:
    """`batch.accepted` in the model's label set, which may hold more labels than the data, on the host."""
    return _ids_in(label_set, batch.label_names)[batch.accepted.cpu()]


def same_spelling(batch: EvalBatch, labels: Tensor, label_set: LabelSet) -> bool:
    """Whether the data spells a batch's labels as the label set does; `labels` are their ids in it, (B,)."""
    pairs = zip(labels.tolist(), batch.label_ids.tolist(), strict=True)
    return all(label_set.names[ours] == batch.label_names[theirs] for ours, theirs in pairs)


@functools.lru_cache(maxsize=4)
def _ids_in(label_set: LabelSet, names: tuple[str, ...]) -> Tensor:
    return torch.tensor([label_set.index(name) for name in names])


def batch_results(batch: EvalBatch, accepted: Tensor, answers: Answers, label_set: LabelSet) -> Results:
    """Results of B notes with their `label_ids`; without the notes' text and the raw answers."""
    prompts, scores = batch.prompts, answers.log_likelihoods
    return Results(
        names=label_set.names,
        rows=np.array(prompts.rows),
        ids=list(prompts.ids),
        text_hashes=list(batch.text_hashes),
        truth=accepted[:, 0].numpy().astype(np.int64),
        accepted=[list(dict.fromkeys(own)) for own in accepted.tolist()],
        answer=answers.label_ids.cpu().numpy(),
        # In float32 rows add up to 1 to seven digits only, and labels that a temperature or a prior lifts become 0.
        probabilities=None if scores is None else scores.double().softmax(dim=1).cpu().numpy(),
        tokens=prompts.attention_mask.sum(dim=1).cpu().numpy(),
        cut_tokens=np.array(prompts.cut_tokens),
    )


def gather_results(parts: Sequence[Results]) -> Results:
    """The results of all batches and all processes, in the order of the table, on every process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Results.join(parts)
    gathered: list[list[Results]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, list(parts))
    return Results.join([part for rank in gathered for part in rank])
