"""Balance changes how often a label's notes come up, by the declared share, and nothing else about a step."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlit.data.samplers import MicroBatch, StepSampler, epoch_order, shares
from medlit.data.settings import Batching, ClassBalance

KINDS = get_args(ClassBalance)
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
kinds = st.sampled_from(KINDS)


def labels_of(counts: list[int]) -> np.ndarray:
    """So many notes of each label, in an order without a pattern."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@given(COUNTS, kinds, st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_draws_labels_by_their_share_and_their_notes_evenly(
    counts: list[int], class_balance: ClassBalance, seed: int, epoch: int
) -> None:
    labels = labels_of(counts)
    order = epoch_order(labels, class_balance, seed, epoch)
    wanted = shares(np.array(counts), class_balance) * len(labels)
    assert len(order) == len(labels)
    assert np.all(np.abs(np.bincount(labels[order], minlength=len(counts)) - wanted) < 1 + 1e-9)
    drawn = np.bincount(order, minlength=len(labels))
    for label in range(len(counts)):
        assert np.ptp(drawn[labels == label]) <= 1


def test_shares_are_the_declared_ones() -> None:
    counts = np.array([900, 100])
    assert shares(counts, "none").tolist() == pytest.approx([0.9, 0.1])
    assert shares(counts, "sqrt").tolist() == pytest.approx([0.75, 0.25])
    assert shares(counts, "inverse").tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("class_balance", KINDS)
def test_over_many_steps_every_note_comes_up_as_often_as_expected(class_balance: ClassBalance) -> None:
    counts = [50, 20, 7, 2, 1]
    labels = labels_of(counts)
    steps = [step for epoch in range(400) for step in notes(sampler(labels, class_balance), epoch)]
    drawn = np.bincount(np.concatenate(steps), minlength=len(labels)) / (len(steps) * 16)
    expected = (shares(np.array(counts), class_balance) / counts)[labels]
    assert drawn == pytest.approx(expected, rel=0.3)
    by_label = np.bincount(labels, weights=drawn)
    assert by_label == pytest.approx(shares(np.array(counts), class_balance), abs=0.005)


def test_none_is_the_plain_shuffle() -> None:
    labels = labels_of([30, 3])
    assert sorted(epoch_order(labels, "none", 0, 0)) == list(range(33))
    assert epoch_order(labels, "none", 0, 0).tolist() == np.random.default_rng([0, 0]).permutation(33).tolist()


@pytest.mark.parametrize("class_balance", KINDS)
def test_seed_and_epoch_decide_the_order(class_balance: ClassBalance) -> None:
    labels = labels_of([30, 20, 10])
    first = epoch_order(labels, class_balance, 0, 0).tolist()
    assert epoch_order(labels, class_balance, 0, 0).tolist() == first
    assert epoch_order(labels, class_balance, 0, 1).tolist() != first
    assert epoch_order(labels, class_balance, 1, 0).tolist() != first


# --- in the sampler ---------------------------------------------------------------------------------------------------


def sampler(
    labels: np.ndarray, class_balance: ClassBalance, micro_batch_size: int = 16, rank: int = 0, world: int = 1
) -> StepSampler:
    lengths = np.random.default_rng(1).integers(1, 900, len(labels))
    batching = Batching(global_batch_size=16, micro_batch_size=micro_batch_size, class_balance=class_balance, seed=7)
    return StepSampler(lengths, lengths, labels, batching, token_budget=10**9, rank=rank, world_size=world)


def notes(sampler: StepSampler, epoch: int = 0) -> list[list[int]]:
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
def test_a_step_has_the_same_notes_for_any_ranks_and_micro_batches(
    counts: list[int], class_balance: ClassBalance, shape: tuple[int, int], epoch: int
) -> None:
    labels = labels_of(counts)
    world, micro_batch_size = shape
    whole = notes(sampler(labels, class_balance), epoch)
    ranks = [notes(sampler(labels, class_balance, micro_batch_size, rank, world), epoch) for rank in range(world)]
    dealt = [sorted(index for part in parts for index in part) for parts in zip(*ranks, strict=True)]
    assert dealt == whole
    assert len(whole) == len(labels) // 16, "an epoch has as many steps as without"
    assert {len(step) for step in whole} == {16}


@pytest.mark.parametrize("class_balance", KINDS)
def test_resuming_continues_within_the_epoch(class_balance: ClassBalance) -> None:
    found = sampler(labels_of([60, 30, 8, 2]), class_balance, micro_batch_size=4)
    found.set_epoch(3)
    whole = list(found)
    for first in range(found.steps):
        found.first_step = first
        assert list(found) == whole[first * found.micro_batches :]


def test_a_label_of_one_note_may_stand_in_a_step_more_than_once() -> None:
    labels = labels_of([47, 1])
    rare = int(np.flatnonzero(labels == 1)[0])
    counts = [Counter(step)[rare] for step in notes(sampler(labels, "inverse"))]
    assert sum(counts) >= 16
    assert max(counts) > 1


# --- several labels a note --------------------------------------------------------------------------------------------

OWN = st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3).map(sorted), min_size=4, max_size=40)


def examples_of(own: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Label and note of each example."""
    notes = np.repeat(np.arange(len(own)), [len(labels) for labels in own])
    return np.array([label for labels in own for label in labels]), notes


@given(own=OWN, seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_note_is_trained_on_one_of_its_labels(own: list[list[int]], seed: int, epoch: int) -> None:
    labels, notes = examples_of(own)
    order = epoch_order(labels, "none", seed, epoch, notes)
    assert sorted(notes[order]) == list(range(len(own)))
    assert order.tolist() == epoch_order(labels, "none", seed, epoch, notes).tolist(), "a resumed epoch draws the same"
    alone = epoch_order(np.zeros(len(own)), "none", seed, epoch)
    assert notes[order].tolist() == alone.tolist(), "the notes come in the order that they come in with one label"


def test_every_label_of_a_note_is_drawn_in_some_epoch() -> None:
    labels, notes = examples_of([[0, 1, 2], [1], [0, 2]] * 4)
    drawn = {example for epoch in range(40) for example in epoch_order(labels, "none", 0, epoch, notes).tolist()}
    assert drawn == set(range(len(labels)))


@given(own=OWN, seed=st.integers(0, 9))
def test_a_note_counts_for_each_of_its_labels(own: list[list[int]], seed: int) -> None:
    labels, notes = examples_of(own)
    order = epoch_order(labels, "inverse", seed, 0, notes)
    assert len(order) == len(own)
    drawn = np.bincount(labels[order], minlength=5)[np.unique(labels)]
    assert drawn.max() - drawn.min() <= 1
