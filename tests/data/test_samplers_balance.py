"""Properties of how a step is divided: the best cuts, even shares, and nothing lost."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest
from fakes import log_normal
from hypothesis import given, settings
from hypothesis import strategies as st

from medlit.data.samplers import balance_ranks, balance_tokens, micro_batches_per_step, split_by_length
from medlit.data.settings import Batching

LENGTHS = st.lists(st.integers(1, 2048), min_size=1, max_size=9).map(lambda lengths: sorted(lengths, reverse=True))


@pytest.mark.parametrize(
    ("examples", "batch", "world", "wanted"),
    [(32, 8, 1, 4), (32, 8, 8, 1), (32, 5, 1, 7), (32, 64, 1, 1), (32, 1, 4, 8)],
)
def test_accumulation_follows_from_the_step(examples: int, batch: int, world: int, wanted: int) -> None:
    assert micro_batches_per_step(Batching(examples, batch), world) == wanted


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_ranks_get_equal_numbers_and_no_swap_helps(ranks: int, each: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 2048), min_size=ranks * each, max_size=ranks * each))
    costs.sort(reverse=True)
    dealt = balance_ranks(costs, ranks)
    assert sorted(place for mine in dealt for place in mine) == list(range(ranks * each))
    assert {len(mine) for mine in dealt} == {each}
    totals = [sum(costs[place] for place in mine) for mine in dealt]
    most = totals.index(max(totals))
    for mine, total in zip(dealt, totals, strict=True):
        for ours, theirs in product(dealt[most], mine):
            moved = costs[ours] - costs[theirs]
            assert not 0 < moved < max(totals) - total, "the two would come closer together"


def padded(lengths: list[int], sizes: tuple[int, ...] | list[int]) -> list[int]:
    """Padded tokens of each group."""
    starts = np.cumsum([0, *sizes])
    return [lengths[start] * (end - start) for start, end in pairwise(starts.tolist())]


def every_cut(n: int, groups: int) -> list[list[int]]:
    return [[b - a for a, b in pairwise([0, *cut, n])] for cut in combinations(range(1, n), groups - 1)]


@given(LENGTHS, st.data())
def test_groups_by_length_are_the_best_of_all_cuts(lengths: list[int], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, len(lengths)))
    budget = data.draw(st.none() | st.integers(1, 3 * max(lengths)))
    sizes = split_by_length(lengths, groups, budget)
    assert len(sizes) == groups
    assert min(sizes) >= 1
    assert sum(sizes) == len(lengths)
    cuts = [padded(lengths, cut) for cut in every_cut(len(lengths), groups)]
    peak = max(budget or 0, min(map(max, cuts)))  # the budget, or the nearest to it that there is
    assert max(padded(lengths, sizes)) <= peak
    assert sum(padded(lengths, sizes)) == min(sum(cut) for cut in cuts if max(cut) <= peak)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([(32, 4), (32, 8), (32, 1), (16, 7)]))
def test_the_budget_holds_where_equal_groups_of_the_longest_notes_would_hold(seed: int, shape: tuple[int, int]) -> None:
    n, groups = shape
    lengths = sorted(log_normal(n, seed), reverse=True)
    budget = -(-n // groups) * 1800
    assert max(padded(lengths, split_by_length(lengths, groups, budget))) <= budget


@given(LENGTHS, st.data())
def test_packed_groups_hold_each_note_once_and_are_nearly_even(lengths: list[int], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, len(lengths)))
    dealt = balance_tokens(lengths, groups)
    assert sorted(place for group in dealt for place in group) == list(range(len(lengths)))
    assert len(dealt) == groups
    assert all(dealt)
    best = max(max(lengths), sum(lengths) / groups)  # no deal has a smaller largest group
    assert max(sum(lengths[place] for place in group) for group in dealt) <= 2 * best
