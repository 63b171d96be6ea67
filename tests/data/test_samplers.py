"""Properties of the step sampler: grouping and class balance change what they are for and nothing else."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations, pairwise, product
from typing import get_args

import numpy as np
import pytest
from fakes import log_normal
from hypothesis import given, settings
from hypothesis import strategies as st

from medlit.data.samplers import (
    MicroBatch,
    StepSampler,
    balance_ranks,
    balance_tokens,
    epoch_order,
    length_sorted_batches,
    micro_batches_per_step,
    split_by_length,
)
from medlit.data.settings import Batching, ClassBalance
from medlit.errors import UserError


def make_sampler(
    lengths: list[int],
    supervised: list[int] | None = None,
    token_budget: int = 10**9,
    packed: bool = False,
    rank: int = 0,
    world_size: int = 1,
    **batching: int,
) -> StepSampler:
    """A sampler of 16 notes a step, 4 a micro-batch, with one supervised token a note."""
    n = len(lengths)
    return StepSampler(
        np.array(lengths),
        np.array(supervised or [1] * n),
        np.zeros(n, dtype=np.int64),
        np.arange(n),
        Batching(**{"global_batch_size": 16, "micro_batch_size": 4, "seed": 0} | batching),
        token_budget,
        packed,
        rank,
        world_size,
    )


def steps(lengths: list[int], world_size: int = 1, epoch: int = 0, **settings: int) -> list[list[list[MicroBatch]]]:
    """[step][rank] -> micro-batches of one epoch."""
    ranks = []
    for rank in range(world_size):
        sampler = make_sampler(lengths, rank=rank, world_size=world_size, **settings)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        per_step = sampler.micro_batches
        assert len(batches) == len(sampler) == sampler.steps * per_step
        ranks.append([batches[i : i + per_step] for i in range(0, len(batches), per_step)])
    return [list(step) for step in zip(*ranks, strict=True)]


def notes(step: list[list[MicroBatch]]) -> list[int]:
    return sorted(index for rank in step for batch in rank for index in batch.indices)


# --- the optimizer step -----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.sampled_from([(1, 4), (1, 16), (1, 1), (2, 4), (4, 3), (8, 2), (16, 1)]),
    st.integers(16, 70),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_step_has_the_same_notes_for_any_ranks_and_micro_batches(
    shape: tuple[int, int], n: int, epoch: int, packed: bool
) -> None:
    world_size, micro_batch_size = shape
    lengths = log_normal(n)
    plain = steps(lengths, epoch=epoch, micro_batch_size=16)
    dealt = steps(lengths, world_size, epoch, micro_batch_size=micro_batch_size, packed=packed)
    assert [notes(step) for step in dealt] == [notes(step) for step in plain]


@settings(max_examples=30)
@given(st.sampled_from([(1, 4), (1, 5), (2, 3), (4, 4), (8, 1)]), st.integers(16, 70), st.booleans())
def test_ranks_get_equal_numbers_of_micro_batches_and_packed_notes(
    shape: tuple[int, int], n: int, packed: bool
) -> None:
    world_size, micro_batch_size = shape
    wanted = micro_batches_per_step(Batching(16, micro_batch_size), world_size)
    dealt = steps(log_normal(n), world_size, micro_batch_size=micro_batch_size, packed=packed)
    assert len(dealt) == n // 16, "a partial step is left out"
    for step in dealt:
        assert len(set(notes(step))) == 16
        for rank in step:
            assert len(rank) == wanted
            assert all(batch.indices for batch in rank)
            assert not packed or sum(len(batch.indices) for batch in rank) == 16 // world_size


def test_an_epoch_has_no_note_twice_and_each_is_another_shuffle() -> None:
    lengths = log_normal(100)
    first, again, second = (steps(lengths, epoch=epoch) for epoch in (0, 0, 1))
    shown = [index for step in first for index in notes(step)]
    assert len(shown) == len(set(shown)) == 96
    assert first == again
    assert [notes(step) for step in first] != [notes(step) for step in second]
    assert [notes(step) for step in first] != [notes(step) for step in steps(lengths, seed=1)]


def test_notes_left_out_of_one_epoch_come_up_in_another() -> None:
    lengths = log_normal(31)
    shown = {index for epoch in range(30) for step in steps(lengths, epoch=epoch) for index in notes(step)}
    assert shown == set(range(31))


def test_step_tokens_are_those_of_the_whole_step_over_all_ranks() -> None:
    supervised = list(range(1, 65))
    for world_size in (1, 2, 4):
        ranks = [
            list(make_sampler(log_normal(64), supervised, rank=rank, world_size=world_size, global_batch_size=32))
            for rank in range(world_size)
        ]
        per_step = len(ranks[0]) // 2
        for step in range(2):
            mine = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
            total = sum(supervised[index] for batch in mine for index in batch.indices)
            assert {batch.step_tokens for batch in mine} == {total}


@pytest.mark.parametrize(
    ("world_size", "packed", "idle"),
    # Dealt in rounds alone, 8 ranks would idle for 4.3 % of a step; with padding for 2, 11 and 22 %.
    [(2, True, 0.002), (4, True, 0.004), (8, True, 0.015), (2, False, 0.03), (4, False, 0.08), (8, False, 0.15)],
)
def test_ranks_hardly_idle(world_size: int, packed: bool, idle: float) -> None:
    """As in the recipe, 32 notes a step in micro-batches of 8: of the time of the slowest, what a rank waits."""
    lengths = np.array(log_normal(32 * 100))
    dealt = steps(
        lengths.tolist(), world_size, global_batch_size=32, micro_batch_size=8, packed=packed, token_budget=8 * 2048
    )
    tokens = np.array(
        [[sum(cells(lengths[batch.indices], packed) for batch in rank) for rank in step] for step in dealt]
    )
    assert tokens.shape == (100, world_size)
    assert np.mean(1 - tokens.mean(1) / tokens.max(1)) < idle


def cells(lengths: np.ndarray, packed: bool) -> int:
    """Tokens that one micro-batch makes the device compute."""
    return int(lengths.sum() if packed else lengths.max() * len(lengths))


def test_padded_notes_of_several_ranks_are_grouped_over_the_whole_step() -> None:
    """A rank's own mixture of 4 lengths would more than double the tokens of the slowest of 8."""
    lengths = np.array(log_normal(32 * 64))
    dealt = steps(lengths.tolist(), 8, global_batch_size=32, micro_batch_size=8, token_budget=8 * 2048)
    slowest = sum(max(cells(lengths[rank[0].indices], False) for rank in step) for step in dealt)
    assert 8 * slowest < 1.3 * lengths.sum()
    counted = [sum(int(lengths[step[rank][0].indices].sum()) for step in dealt) for rank in range(8)]
    assert max(counted) < 1.1 * min(counted), "any rank's count, times 8, tells the speed of all"


@given(st.lists(st.integers(1, 400), min_size=16, max_size=16), st.integers(1, 2000))
def test_the_budget_bounds_padded_micro_batches_of_one_rank_where_possible(lengths: list[int], budget: int) -> None:
    """There are four in any case. Packed ones, and those of several ranks, are the same whatever the budget."""
    (free,), (bound,) = (steps(lengths, token_budget=each)[0] for each in (10**9, budget))
    largest, within = (max(cells(np.array(lengths)[x.indices], False) for x in of) for of in (free, bound))
    least = max(cells(np.array(lengths)[x.indices], False) for x in steps(lengths, token_budget=1)[0][0])
    assert len(bound) == 4
    assert within <= max(budget, least)
    assert notes([bound]) == list(range(16))
    assert largest >= least
    for others in ({"packed": True}, {"world_size": 2}, {"packed": True, "world_size": 2}):
        assert steps(lengths, token_budget=budget, **others) == steps(lengths, token_budget=10**9, **others)


def test_resuming_gives_the_rest_of_the_epoch_and_the_next_epoch_whole() -> None:
    lengths = log_normal(100)
    sampler = make_sampler(lengths, lengths)
    whole = list(sampler)
    for first in range(sampler.steps):
        sampler.first_step = first
        assert list(sampler) == whole[first * sampler.micro_batches :]
        assert list(sampler) == whole
    assert len(sampler) == len(whole), "Lightning counts batches of the whole epoch"


def test_a_step_larger_than_the_table_and_ranks_that_do_not_divide_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.batching\.global_batch_size: the training split has 15 notes"):
        steps([1] * 15)
    with pytest.raises(UserError, match=r"data\.batching\.global_batch_size: 16 notes .* 3 processes"):
        steps([1] * 16, world_size=3)


# --- groups of like length --------------------------------------------------------------------------------------------


def padding(lengths: np.ndarray, groups: list[list[int]]) -> float:
    """Share of padding in the padded tokens of one step's groups."""
    total = sum(int(lengths[group].max()) * len(group) for group in groups)
    return 1 - int(lengths[np.concatenate(groups)].sum()) / total


@pytest.mark.parametrize(("micro_batch_size", "share"), [(8, 0.145), (4, 0.055)])
def test_padding_of_real_lengths(micro_batch_size: int, share: float) -> None:
    """4 and 8 groups of the best sizes, the mean of 1,000 steps."""
    lengths = np.array(log_normal(32 * 1000))
    dealt = steps(lengths.tolist(), global_batch_size=32, micro_batch_size=micro_batch_size, token_budget=8 * 2048)
    found = [padding(lengths, [batch.indices for batch in step[0]]) for step in dealt]
    assert len(found) == 1000
    assert share - 0.02 < np.mean(found) <= share


def test_padding_of_four_groups_of_eight() -> None:
    lengths = np.array(log_normal(32 * 1000))
    whole = [notes_of[0][0].indices for notes_of in steps(lengths.tolist(), global_batch_size=32, micro_batch_size=32)]
    found = [padding(lengths, np.array(indices).reshape(4, 8).tolist()) for indices in whole]
    assert len(found) == 1000
    assert 0.145 < np.mean(found) <= 0.2, "the best sizes save padding, and equal ones are already far from 46 %"


@pytest.mark.parametrize(("micro_batch_size", "share"), [(16, 1.01), (8, 1.02), (4, 1.05)])
def test_packed_micro_batches_of_real_lengths_are_nearly_equal(micro_batch_size: int, share: float) -> None:
    """The largest decides how much memory a step takes."""
    lengths = np.array(log_normal(32 * 100))
    dealt = steps(lengths.tolist(), global_batch_size=32, micro_batch_size=micro_batch_size, packed=True)
    tokens = [[int(lengths[batch.indices].sum()) for batch in step[0]] for step in dealt]
    assert np.mean([max(step) / np.mean(step) for step in tokens]) < share


def test_sampling_is_fast() -> None:
    lengths = log_normal(60 * 32)
    start = time.perf_counter()
    steps(lengths, global_batch_size=32, micro_batch_size=4)
    assert time.perf_counter() - start < 2  # 0.15 s on an idle core
    many = np.tile(lengths, 521)  # a million notes
    sampler = StepSampler(many, many, np.zeros_like(many), np.arange(len(many)), Batching(), 10**9)
    start = time.perf_counter()
    next(iter(sampler))
    assert time.perf_counter() - start < 2


# --- evaluation -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 3000), min_size=0, max_size=60), st.integers(1, 9), st.integers(1, 9000), st.integers(1, 5)
)
def test_evaluation_shows_each_note_once_within_the_budget(
    lengths: list[int], batch_size: int, budget: int, world_size: int
) -> None:
    samplers = [length_sorted_batches(lengths, batch_size, budget, rank, world_size) for rank in range(world_size)]
    assert sorted(i for sampler in samplers for batch in sampler for i in batch) == list(range(len(lengths)))
    counts = [sum(map(len, sampler)) for sampler in samplers]
    assert max(counts) - min(counts) <= 1
    for sampler in samplers:
        assert len(sampler) == len(list(sampler))
        for batch in sampler:
            assert 1 <= len(batch) <= batch_size
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        seen = [lengths[i] for batch in sampler for i in batch]
        assert seen == sorted(seen, reverse=True), "the longest first: what does not fit fails at once"


# --- several labels a note --------------------------------------------------------------------------------------------

# Tokens of the prompt and of each answer.
ANSWERED = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(1, 8), min_size=1, max_size=4)), min_size=16, max_size=48
)


@settings(max_examples=30, deadline=None)
@given(own=ANSWERED, packed=st.booleans(), world=st.sampled_from([1, 2]))
def test_a_step_s_tokens_are_those_of_the_answers_that_it_trains(
    own: list[tuple[int, list[int]]], packed: bool, world: int
) -> None:
    notes = np.repeat(np.arange(len(own)), [len(answers) for _, answers in own])
    supervised = np.array([tokens for _, answers in own for tokens in answers])
    lengths = np.array([prompt for prompt, _ in own])[notes] + supervised
    batching = Batching(global_batch_size=16, micro_batch_size=4)
    ranks = [
        list(StepSampler(lengths, supervised, supervised, notes, batching, 10**9, packed, rank, world))
        for rank in range(world)
    ]
    per_step = 16 // world // 4
    shown = [index for rank in ranks for batch in rank for index in batch.indices]
    assert len(shown) == len(set(shown)) == len(own) // 16 * 16
    for step in range(len(own) // 16):
        batches = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
        pairs = [pair for batch in batches for pair in zip(batch.indices, batch.label_places, strict=True)]
        assert {batch.step_tokens for batch in batches} == {sum(own[index][1][place] for index, place in pairs)}


# --- how a step is divided --------------------------------------------------------------------------------------------


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


def padded(lengths: list[int], bounds: list[int]) -> list[int]:
    """Padded tokens of each group."""
    return [lengths[start] * (end - start) for start, end in pairwise(bounds)]


def every_cut(n: int, groups: int) -> list[list[int]]:
    return [[0, *cut, n] for cut in combinations(range(1, n), groups - 1)]


@given(LENGTHS, st.data())
def test_groups_by_length_are_the_best_of_all_cuts(lengths: list[int], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, len(lengths)))
    budget = data.draw(st.none() | st.integers(1, 3 * max(lengths)))
    bounds = split_by_length(lengths, groups, budget)
    assert len(bounds) == groups + 1
    assert all(start < end for start, end in pairwise(bounds))
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    cuts = [padded(lengths, cut) for cut in every_cut(len(lengths), groups)]
    peak = max(budget or 0, min(map(max, cuts)))  # the budget, or the nearest to it that there is
    assert max(padded(lengths, bounds)) <= peak
    assert sum(padded(lengths, bounds)) == min(sum(cut) for cut in cuts if max(cut) <= peak)


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


# --- class balance ----------------------------------------------------------------------------------------------------


KINDS = get_args(ClassBalance)
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
kinds = st.sampled_from(KINDS)


def shares(counts: np.ndarray, class_balance: ClassBalance) -> np.ndarray:
    """Of the draws, for each label."""
    weights = {"none": counts, "sqrt": np.sqrt(counts), "inverse": np.ones(len(counts))}[class_balance]
    return weights / weights.sum()


def labels_of(counts: list[int]) -> np.ndarray:
    """So many notes of each label, in an order without a pattern."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@given(COUNTS, kinds, st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_draws_labels_by_their_share_and_their_notes_evenly(
    counts: list[int], class_balance: ClassBalance, seed: int, epoch: int
) -> None:
    labels = labels_of(counts)
    order = epoch_order(labels, np.arange(len(labels)), class_balance, seed, epoch)
    wanted = shares(np.array(counts), class_balance) * len(labels)
    assert len(order) == len(labels)
    assert np.all(np.abs(np.bincount(labels[order], minlength=len(counts)) - wanted) < 1 + 1e-9)
    drawn = np.bincount(order, minlength=len(labels))
    for label in range(len(counts)):
        assert np.ptp(drawn[labels == label]) <= 1


@pytest.mark.parametrize("class_balance", KINDS)
def test_over_many_steps_every_note_comes_up_as_often_as_expected(class_balance: ClassBalance) -> None:
    counts = [50, 20, 7, 2, 1]
    labels = labels_of(counts)
    steps = [step for epoch in range(400) for step in notes_of_steps(balanced(labels, class_balance), epoch)]
    drawn = np.bincount(np.concatenate(steps), minlength=len(labels)) / (len(steps) * 16)
    expected = (shares(np.array(counts), class_balance) / counts)[labels]
    assert drawn == pytest.approx(expected, rel=0.3)
    by_label = np.bincount(labels, weights=drawn)
    assert by_label == pytest.approx(shares(np.array(counts), class_balance), abs=0.005)


def test_none_is_the_plain_shuffle() -> None:
    labels = labels_of([30, 3])
    assert sorted(epoch_order(labels, np.arange(33), "none", 0, 0)) == list(range(33))
    assert (
        epoch_order(labels, np.arange(33), "none", 0, 0).tolist()
        == np.random.default_rng([0, 0]).permutation(33).tolist()
    )


@pytest.mark.parametrize("class_balance", KINDS)
def test_seed_and_epoch_decide_the_order(class_balance: ClassBalance) -> None:
    labels = labels_of([30, 20, 10])
    first = epoch_order(labels, np.arange(60), class_balance, 0, 0).tolist()
    assert epoch_order(labels, np.arange(60), class_balance, 0, 0).tolist() == first
    assert epoch_order(labels, np.arange(60), class_balance, 0, 1).tolist() != first
    assert epoch_order(labels, np.arange(60), class_balance, 1, 0).tolist() != first


# --- class balance of steps -------------------------------------------------------------------------------------------


def balanced(
    labels: np.ndarray, class_balance: ClassBalance, micro_batch_size: int = 16, rank: int = 0, world: int = 1
) -> StepSampler:
    lengths = np.random.default_rng(1).integers(1, 900, len(labels))
    batching = Batching(global_batch_size=16, micro_batch_size=micro_batch_size, class_balance=class_balance, seed=7)
    return StepSampler(lengths, lengths, labels, np.arange(len(labels)), batching, 10**9, False, rank, world)


def notes_of_steps(sampler: StepSampler, epoch: int = 0) -> list[list[int]]:
    """Notes of each step on this rank, repeats included."""
    sampler.set_epoch(epoch)
    batches: list[MicroBatch] = list(sampler)
    size = sampler.micro_batches
    return [
        sorted(index for batch in batches[start : start + size] for index in batch.indices)
        for start in range(0, len(batches), size)
    ]


@settings(max_examples=40, deadline=None)
@given(
    COUNTS.filter(lambda counts: sum(counts) >= 16),
    kinds,
    st.sampled_from([(1, 4), (1, 1), (2, 4), (4, 3), (16, 1)]),
    st.integers(0, 3),
)
def test_a_balanced_step_has_the_same_notes_for_any_ranks_and_micro_batches(
    counts: list[int], class_balance: ClassBalance, shape: tuple[int, int], epoch: int
) -> None:
    labels = labels_of(counts)
    world, micro_batch_size = shape
    whole = notes_of_steps(balanced(labels, class_balance), epoch)
    ranks = [
        notes_of_steps(balanced(labels, class_balance, micro_batch_size, rank, world), epoch) for rank in range(world)
    ]
    dealt = [sorted(index for part in parts for index in part) for parts in zip(*ranks, strict=True)]
    assert dealt == whole
    assert len(whole) == len(labels) // 16, "an epoch has as many steps as without"
    assert {len(step) for step in whole} == {16}


@pytest.mark.parametrize("class_balance", KINDS)
def test_resuming_continues_within_the_epoch(class_balance: ClassBalance) -> None:
    found = balanced(labels_of([60, 30, 8, 2]), class_balance, micro_batch_size=4)
    found.set_epoch(3)
    whole = list(found)
    for first in range(found.steps):
        found.first_step = first
        assert list(found) == whole[first * found.micro_batches :]


def test_a_label_of_one_note_may_stand_in_a_step_more_than_once() -> None:
    labels = labels_of([47, 1])
    rare = int(np.flatnonzero(labels == 1)[0])
    counts = [Counter(step)[rare] for step in notes_of_steps(balanced(labels, "inverse"))]
    assert sum(counts) >= 16
    assert max(counts) > 1


# --- which of several labels ------------------------------------------------------------------------------------------

OWN = st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3).map(sorted), min_size=4, max_size=40)


def examples_of(own: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Label and note of each example."""
    notes = np.repeat(np.arange(len(own)), [len(labels) for labels in own])
    return np.array([label for labels in own for label in labels]), notes


@given(own=OWN, seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_note_is_trained_on_one_of_its_labels(own: list[list[int]], seed: int, epoch: int) -> None:
    labels, notes = examples_of(own)
    order = epoch_order(labels, notes, "none", seed, epoch)
    assert sorted(notes[order]) == list(range(len(own)))
    assert order.tolist() == epoch_order(labels, notes, "none", seed, epoch).tolist(), "a resumed epoch draws the same"
    alone = epoch_order(np.zeros(len(own)), np.arange(len(own)), "none", seed, epoch)
    assert notes[order].tolist() == alone.tolist(), "the notes come in the order that they come in with one label"


def test_every_label_of_a_note_is_drawn_in_some_epoch() -> None:
    labels, notes = examples_of([[0, 1, 2], [1], [0, 2]] * 4)
    drawn = {example for epoch in range(40) for example in epoch_order(labels, notes, "none", 0, epoch).tolist()}
    assert drawn == set(range(len(labels)))


@given(own=OWN, seed=st.integers(0, 9))
def test_a_note_counts_for_each_of_its_labels(own: list[list[int]], seed: int) -> None:
    labels, notes = examples_of(own)
    order = epoch_order(labels, notes, "inverse", seed, 0)
    assert len(order) == len(own)
    drawn = np.bincount(labels[order], minlength=5)[np.unique(labels)]
    assert drawn.max() - drawn.min() <= 1
