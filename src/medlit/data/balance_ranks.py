"""How the notes of an optimizer step are divided into micro-batches and balanced over ranks, by their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

from medlit.errors import UserError


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank accumulates: ceil(notes per rank / micro-batch size).

    Raises:
        UserError: the step cannot be shared evenly.
    """
    if global_batch_size % world_size:
        raise UserError(
            f"data.batching.global_batch_size: {global_batch_size} notes an optimizer step cannot be shared evenly by"
            f" {world_size} processes; choose a number of devices that divides it, or another global_batch_size."
        )
    return -(-(global_batch_size // world_size) // micro_batch_size)


def split_by_length(lengths: Sequence[int], groups: int, budget: int | None) -> list[int]:
    """Divide notes sorted by length into groups with the least padding.

    Args:
        lengths: n lengths in tokens, longest first.
        groups: number of groups G, at most n; none is empty.
        budget: most padded tokens (notes x longest) of one group; where that is impossible, and for None, the largest
            group is minimised.

    Returns:
        G group sizes that add up to n.
    """
    n = len(lengths)
    # cost[i, j]: padded tokens of the group of notes i .. j-1; its longest note is the first.
    cost = np.asarray(lengths)[:, None] * (np.arange(n + 1)[None, :] - np.arange(n)[:, None])
    least, sizes = np.inf, list[int]()
    if budget is not None:
        least, sizes = _divide(np.where(cost <= budget, cost, np.inf), groups, np.add)
    if np.isinf(least):
        peak, _ = _divide(cost, groups, np.maximum)
        _, sizes = _divide(np.where(cost <= peak, cost, np.inf), groups, np.add)
    return sizes


def _divide(cost: np.ndarray, groups: int, combine: np.ufunc) -> tuple[float, list[int]]:
    """The least sum or maximum (`combine`) of the groups' costs, and the groups' sizes that have it."""
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
    return float(best[groups, n]), [end - start for start, end in pairwise(ends[::-1])]


def balance_tokens(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Assign notes to groups of about equal tokens: each to the group that has the fewest so far.

    Longest first, this is at most 4/3 of the optimum (Graham 1969, doi:10.1137/0117039).

    Args:
        lengths: n lengths in tokens, longest first.
        groups: number of groups, at most n; none is empty.

    Returns:
        Indices into `lengths` of each group's notes.
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

    Args:
        costs: n costs, highest first; n is a multiple of the ranks.
        ranks: number of ranks R.

    Returns:
        R lists of n / R indices into `costs`.
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
