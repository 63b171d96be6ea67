"""Samplers: which notes an optimizer step trains on, and how they are shared by ranks and micro-batches.

`StepSampler` draws each step's notes at random (none twice in an epoch, unless `class_balance` draws rare labels more
often) and only then sorts them by length and shares them. So the notes of step s are the same set for any number of
ranks and micro-batches, and one YAML trains alike on 1 or 8 GPUs.

Class balance: of N training notes with K labels, n_c of them with label c, an epoch of N draws gives label c on average

    none     n_c                                    every note once
    sqrt     N x sqrt(n_c) / sum of all sqrt(n_k)   between the two (as Mahajan 2018, arXiv 1805.00932)
    inverse  N / K                                  every label equally often

and a label's draws are spread evenly over its notes: none is drawn twice before all have been drawn once.

A note with several labels counts for each of them, and is trained on one at a time: the one that class balance drew it
for, else one at random, the same for the same seed, epoch and note. An example is a note with one of its labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from medlit.data.settings import Batching, ClassBalance
from medlit.errors import UserError
from medlit.evaluation.results import IntArray


def epoch_order(labels: IntArray, notes: IntArray, class_balance: ClassBalance, seed: int, epoch: int) -> IntArray:
    """The examples of an epoch in training order, as many as there are notes, (N,).

    They are indices into `labels` and `notes`, the label id and the note of all examples, (E,); see `StepSampler`.
    """
    rng = np.random.default_rng([seed, epoch])
    several = np.bincount(notes)
    number = len(several)
    if class_balance == "none":
        order = rng.permutation(number)
        drawn = (np.random.default_rng([seed, epoch, 1]).random(number) * several).astype(np.int64)
        return np.asarray((np.cumsum(several) - several + drawn)[order])
    order = rng.permutation(len(labels))
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = np.sqrt(counts) if class_balance == "sqrt" else np.ones(len(counts))
    # Systematic sampling: with one random offset a label's draws are its expected number rounded up or down.
    edges = np.floor(np.cumsum(weights / weights.sum()) * number + rng.random()).astype(np.int64)
    edges[-1] = number
    drawn = np.diff(edges, prepend=0)
    parts = []
    of_label = np.split(order[np.argsort(codes[order], kind="stable")], np.cumsum(counts)[:-1])
    for mine, draws in zip(of_label, drawn.tolist(), strict=True):
        again = [rng.permutation(mine) for _ in range(-(-draws // len(mine)) - 1)]
        parts.append(np.concatenate([mine, *again])[:draws])
    return rng.permutation(np.concatenate(parts))


class MicroBatch(NamedTuple):
    """Row indices of one micro-batch, and the supervised tokens of its optimizer step."""

    indices: list[int]
    step_tokens: int
    label_places: list[int]  # of the label that each note is trained on, among its own


@dataclass(eq=False)
class StepSampler(Sampler[MicroBatch]):
    """Shares the notes of every optimizer step among the ranks and their micro-batches.

    An incomplete step at the end of an epoch is left out; its notes are drawn in the next shuffle. Raises a UserError
    for fewer notes than one step needs, or ranks that do not divide a step.
    """

    lengths: IntArray  # tokens of each example, prompt and response, (E,)
    supervised: IntArray  # tokens of each that carry loss, (E,)
    labels: IntArray  # label of each as a number, (E,)
    notes: IntArray  # the note of each, 0 .. N-1 ascending, (E,)
    batching: Batching  # batch sizes, class balance and seed; epoch e uses the seed (seed, e)
    token_budget: int  # maximum padded tokens of a micro-batch where possible; unused if packed or on several ranks
    packed: bool = False  # not padded: micro-batches get about equal numbers of tokens instead of similar lengths
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        step = self.batching.global_batch_size
        self.micro_batches = micro_batches_per_step(self.batching, self.world_size)
        several = np.bincount(self.notes)  # examples of each note
        self._first = np.cumsum(several) - several
        self._number = len(several)
        if self._number < step:
            raise UserError(
                f"data.batching.global_batch_size: the training split has {self._number} notes, fewer than the"
                f" {step} of one optimizer step; set data.batching.global_batch_size to {self._number} or less."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self._number // self.batching.global_batch_size

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[MicroBatch]:
        batching, size = self.batching, self.batching.global_batch_size
        # Once: drawing it for every step of a large table would take minutes.
        order = epoch_order(self.labels, self.notes, batching.class_balance, batching.seed, self.epoch)
        first, self.first_step = self.first_step, 0
        for step in range(first, self.steps):
            examples = order[step * size : (step + 1) * size]
            examples = examples[np.argsort(-self.lengths[examples], kind="stable")]
            step_tokens, lengths = int(self.supervised[examples].sum()), self.lengths[examples]
            # Shares rotate, so that over several steps the ranks get equal numbers of notes and tokens.
            share = (self.rank + step) % self.world_size
            for group in self._packed(lengths, share) if self.packed else self._padded(lengths, share):
                notes = self.notes[examples[group]]
                yield MicroBatch(notes.tolist(), step_tokens, (examples[group] - self._first[notes]).tolist())

    def _packed(self, lengths: np.ndarray, share: int) -> list[list[int]]:
        """One rank's micro-batches, as indices into the step: equally many notes per rank, and about equal tokens."""
        mine = sorted(balance_ranks(lengths.tolist(), self.world_size)[share])
        groups = balance_tokens(lengths[mine].tolist(), self.micro_batches)
        return [[mine[place] for place in group] for group in groups]

    def _padded(self, lengths: np.ndarray, share: int) -> list[list[int]]:
        """One rank's micro-batches, as indices into the step: similar lengths, about equal padded tokens."""
        # One rank minimises padding within the budget; several minimise the largest group, for which all ranks wait.
        budget = self.token_budget if self.world_size == 1 else None
        bounds = split_by_length(lengths.tolist(), self.world_size * self.micro_batches, budget)
        groups = [list(range(start, end)) for start, end in pairwise(bounds)]
        cells = [int(lengths[group[0]]) * len(group) for group in groups]
        largest = sorted(range(len(groups)), key=lambda g: -cells[g])
        mine = balance_ranks([cells[g] for g in largest], self.world_size)[share]
        return [groups[g] for g in sorted(largest[place] for place in mine)]


def length_sorted_batches(
    lengths: Sequence[int],  # tokens of each note's prompt
    batch_size: int,
    token_budget: int,  # maximum padded tokens of a batch; a single note may exceed it
    rank: int = 0,
    world_size: int = 1,  # the processes' numbers of notes differ by at most one
    indices: np.ndarray | None = None,  # the notes to use; None: all of them
) -> list[list[int]]:
    """Evaluation batches of notes of similar length, longest first, each note exactly once over all ranks."""
    notes = np.arange(len(lengths)) if indices is None else indices
    order = notes[np.argsort(-np.asarray(lengths, dtype=np.int64)[notes], kind="stable")]
    batches: list[list[int]] = []
    for index in order[rank::world_size].tolist():
        batch = batches[-1] if batches else []
        if batch and len(batch) < batch_size and (len(batch) + 1) * lengths[batch[0]] <= token_budget:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def micro_batches_per_step(batching: Batching, world_size: int) -> int:
    """Micro-batches that each rank accumulates: ceil(notes per rank / micro-batch size); ranks must divide the step."""
    global_batch_size = batching.global_batch_size
    if global_batch_size % world_size:
        raise UserError(
            f"data.batching.global_batch_size: {global_batch_size} notes per optimizer step cannot be shared evenly by"
            f" {world_size} processes; choose a number of devices that divides it, or another global_batch_size."
        )
    return -(-(global_batch_size // world_size) // batching.micro_batch_size)


def split_by_length(lengths: Sequence[int], groups: int, budget: int | None) -> list[int]:
    """Divide n notes, longest first, into groups with the least padding; returns the bounds of these, 0 .. n.

    `budget` is the most padded tokens (notes x longest) of one group; where that is impossible, and for None, the
    largest group is minimised.
    """
    n = len(lengths)
    # cost[i, j]: padded tokens of the group of notes i .. j-1; its longest note is the first.
    cost = np.asarray(lengths)[:, None] * (np.arange(n + 1)[None, :] - np.arange(n)[:, None])
    if budget is not None:
        least, bounds = _divide(np.where(cost <= budget, cost, np.inf), groups, np.add)
        if np.isfinite(least):
            return bounds
    peak, _ = _divide(cost, groups, np.maximum)
    return _divide(np.where(cost <= peak, cost, np.inf), groups, np.add)[1]


def _divide(cost: np.ndarray, groups: int, combine: np.ufunc) -> tuple[float, list[int]]:
    """The least sum or maximum (`combine`) of the groups' costs, and the groups' bounds that have it."""
    n = len(cost)
    best = np.full((groups + 1, n + 1), np.inf)
    cut = np.zeros((groups + 1, n + 1), dtype=np.int64)
    best[0, 0] = 0
    for g in range(1, groups + 1):
        for j in range(g, n - (groups - g) + 1):
            total = combine(best[g - 1, g - 1 : j], cost[g - 1 : j, j])
            i = int(np.argmin(total))
            best[g, j], cut[g, j] = total[i], g - 1 + i
    ends = [n]
    for g in range(groups, 0, -1):
        ends.append(int(cut[g, ends[-1]]))
    return float(best[groups, n]), ends[::-1]


def balance_tokens(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Assign n notes, longest first, to groups of about equal tokens: each to the group that has the fewest so far.

    This is at most 4/3 of the optimum (Graham 1969, doi:10.1137/0117039). Returns the groups' indices into `lengths`;
    none is empty if there are at least as many notes as groups.
    """
    assigned: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    for index, length in enumerate(lengths):
        least = tokens.index(min(tokens))
        assigned[least].append(index)
        tokens[least] += length
    return assigned


def balance_ranks(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign equal numbers of items to the ranks so that their costs are about equal: all ranks wait for the slowest.

    Greedy longest-first assignment, then pairwise swaps with the costliest rank as long as one reduces the difference.
    `costs` are n, highest first, where n is a multiple of the ranks. Returns each rank's n / ranks indices into them.
    """
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(costs), ranks):
        totals = [sum(costs[index] for index in mine) for mine in assigned]
        for index, rank in enumerate(sorted(range(ranks), key=totals.__getitem__), start):
            assigned[rank].append(index)
    while True:
        totals = [sum(costs[index] for index in mine) for mine in assigned]
        most = totals.index(max(totals))
        gain, rank, ours, theirs = 0, most, 0, 0
        for other in set(range(ranks)) - {most}:
            gap = totals[most] - totals[other]
            for i, j in product(range(len(assigned[most])), range(len(assigned[other]))):
                moved = costs[assigned[most][i]] - costs[assigned[other][j]]
                if min(moved, gap - moved) > gain:
                    gain, rank, ours, theirs = min(moved, gap - moved), other, i, j
        if not gain:
            return assigned
        assigned[most][ours], assigned[rank][theirs] = assigned[rank][theirs], assigned[most][ours]
