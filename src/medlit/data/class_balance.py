"""How often a note comes up in training: as it stands in the table, or so that rare labels come up more often.

Of N training notes of K labels, n_c of them with label c, an epoch of N draws gives label c on average

    none     n_c                                    every note once
    sqrt     N x sqrt(n_c) / sum of all sqrt(n_k)   between the two (as Mahajan 2018, arXiv 1805.00932)
    inverse  N / K                                  every label as often

and shares a label's draws out evenly among its notes: none comes up twice before all of them have come up once. So a
frequent label's notes are not all seen in an epoch, and a rare one's are seen several times.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medlit.data.groups import IntArray
from medlit.data.settings import ClassBalance

_POWER = {"none": 1.0, "sqrt": 0.5, "inverse": 0.0}


def shares(counts: IntArray, class_balance: ClassBalance) -> npt.NDArray[np.float64]:
    """Expected share of each label in what is drawn, (K,), adding up to 1.

    Args:
        counts: notes of each label, (K,), at least 1 each.
        class_balance: how labels are weighted.
    """
    weights: npt.NDArray[np.float64] = counts.astype(np.float64) ** _POWER[class_balance]
    return weights / float(weights.sum())


def epoch_order(labels: IntArray, class_balance: ClassBalance, seed: int, epoch: int) -> IntArray:
    """Row numbers of the N notes of an epoch in the order in which they are trained on, (N,).

    Args:
        labels: label id of each note, (N,).
        class_balance: how labels are weighted.
        seed: of the run.
        epoch: which epoch; each has an order of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(labels))
    if class_balance == "none":
        return order
    present, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # Systematic sampling: one random offset, so that a label's draws are its expected ones rounded up or down.
    edges = np.floor(np.cumsum(shares(counts, class_balance)) * len(labels) + rng.random()).astype(np.int64)
    edges[-1] = len(labels)
    drawn = np.diff(edges, prepend=0)
    parts = []
    for label in range(len(present)):
        notes = order[codes[order] == label]
        rounds = -(-int(drawn[label]) // len(notes))
        repeated = [notes, *(rng.permutation(notes) for _ in range(rounds - 1))]
        parts.append(np.concatenate(repeated)[: drawn[label]])
    return rng.permutation(np.concatenate(parts))
