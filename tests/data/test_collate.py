"""What the collator pads, labels and counts."""

from __future__ import annotations

from itertools import accumulate

import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities import move_data_to_device

from medlit.data.collate import Batch, BatchDataset, Collator, TokenisedNote
from medlit.data.samplers import MicroBatch

PAD = 0
ANSWERS = {"Neurology": [9, 2], "Radiology": [8, 7, 6, 2]}
ROWS = st.lists(
    st.builds(
        TokenisedNote,
        row=st.integers(0, 99),
        id=st.text("abc", min_size=1),
        text_hash=st.text("0123456789abcdef", min_size=1),
        input_ids=st.lists(st.integers(1, 99), min_size=1, max_size=12),
        cut_tokens=st.integers(0, 9),
        specialty=st.sampled_from(sorted(ANSWERS)),
    ),
    min_size=1,
    max_size=6,
)
NAMES = tuple(sorted(ANSWERS))
response, whole = (Collator(ANSWERS.__getitem__, PAD, mask_prompt, NAMES) for mask_prompt in (True, False))


def labels(batch: Batch) -> list[list[int]]:
    """The supervised ids where they stand in a padded batch, -100 elsewhere: transformers' way of saying it."""
    out = torch.full(batch.input_ids.shape, -100)
    out.view(-1)[batch.places + 1] = batch.targets
    return out.tolist()


def row(ids: list[int], specialty: str | None = "Neurology") -> TokenisedNote:
    return TokenisedNote(row=3, id="n3", text_hash="f0", input_ids=ids, cut_tokens=1, specialty=specialty)


def test_the_example_of_the_docstring() -> None:
    batch = response.train([row([1, 2, 3]), row([1, 4])], step_tokens=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9, 2], [1, 4, 9, 2, 0]]
    assert batch.places.tolist() == [2, 3, 6, 7]
    assert batch.targets.tolist() == [9, 2, 9, 2]
    assert labels(batch) == [[-100, -100, -100, 9, 2], [-100, -100, 9, 2, -100]]
    packed = Collator(ANSWERS.__getitem__, PAD, most_notes=3).packed([row([1, 2, 3]), row([1, 4])], 4)
    assert packed.input_ids.tolist() == [[1, 2, 3, 9, 2, 1, 4, 9, 2]]
    assert packed.parts == 5
    assert packed.positions is not None
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert packed.places.tolist() == [2, 3, 6, 7]
    prompts = response.prompts([row([1, 2, 3]), row([1, 4])])
    assert prompts.input_ids.tolist() == [[1, 2, 3], [0, 1, 4]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@given(ROWS)
def test_training_pads_on_the_right_and_supervises_the_answers_alone(rows: list[TokenisedNote]) -> None:
    batch = response.train(rows, step_tokens=77)
    assert batch.step_tokens == 77
    assert batch.input_ids.shape == (len(rows), max(batch.lengths))
    for i, note in enumerate(rows):
        prompt, answer = note["input_ids"], ANSWERS[note["specialty"] or ""]
        assert batch.lengths[i] == len(prompt) + len(answer) == response.length(note)
        rest = batch.input_ids.shape[1] - batch.lengths[i]
        assert batch.input_ids[i].tolist() == prompt + answer + [PAD] * rest
        assert labels(batch)[i] == [-100] * len(prompt) + answer + [-100] * rest
        assert batch.ids[i] == note["id"]


@given(ROWS)
def test_without_a_prompt_mask_all_tokens_but_the_first_and_padding_are_supervised(rows: list[TokenisedNote]) -> None:
    batch = whole.train(rows, step_tokens=1)
    assert torch.equal(batch.input_ids, response.train(rows, 1).input_ids)
    for i, length in enumerate(batch.lengths):
        supervised = torch.tensor(labels(batch)[i])
        assert supervised[0] == -100
        assert torch.equal(supervised[1:length], batch.input_ids[i, 1:length])
        assert (supervised[length:] == -100).all()


@given(ROWS, st.sampled_from([response, whole]))
def test_a_packed_batch_is_the_padded_one_without_its_padding(rows: list[TokenisedNote], collator: Collator) -> None:
    packed, padded = collator.packed(rows, 5), collator.train(rows, 5)
    assert packed.positions is not None
    assert packed.lengths == padded.lengths
    assert packed.input_ids.shape == packed.positions.shape == (1, sum(packed.lengths))
    assert packed.parts == collator.most_notes + 2, "as many for any number of notes"
    begins, tokens = [0, *accumulate(packed.lengths)], packed.input_ids[0]
    for i, length in enumerate(packed.lengths):
        assert tokens[begins[i] : begins[i + 1]].tolist() == padded.input_ids[i, :length].tolist()
        assert packed.positions[0, begins[i] : begins[i + 1]].tolist() == list(range(length))
    assert torch.equal(tokens[packed.places + 1], packed.targets)
    again = packed.padded()
    assert not again.parts
    for ours, theirs in zip(again[:3], padded[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert again[3:] == padded[3:]
    assert padded.padded() is padded


@given(ROWS)
def test_prompts_pad_on_the_left_and_end_without_the_answer(rows: list[TokenisedNote]) -> None:
    prompts = response.prompts(rows)
    width = max(len(note["input_ids"]) for note in rows)
    for i, note in enumerate(rows):
        gap = width - len(note["input_ids"])
        assert prompts.input_ids[i].tolist() == [PAD] * gap + note["input_ids"]
        assert prompts.attention_mask[i].tolist() == [0] * gap + [1] * len(note["input_ids"])
    assert prompts.rows == [note["row"] for note in rows]
    assert prompts.ids == [note["id"] for note in rows]
    assert prompts.cut_tokens == [note["cut_tokens"] for note in rows]


def test_prompts_move_to_a_device_as_with_lightning() -> None:
    prompts, device = response.prompts([row([1, 2, 3]), row([1, 4])]), torch.device("meta")
    moved, theirs = prompts.on(device), move_data_to_device(prompts, device)
    assert [tensor.device for tensor in moved[:2]] == [tensor.device for tensor in theirs[:2]] == [device, device]
    assert moved[2:] == theirs[2:] == prompts[2:]


@given(ROWS)
def test_supervised_tokens_are_counted_as_they_are_labelled(rows: list[TokenisedNote]) -> None:
    for collator in (response, whole):
        both = collator.evaluate(rows)
        assert both.loss.step_tokens == len(both.loss.targets) == sum(map(collator.supervised, rows))
        columns = both.loss.places % both.loss.input_ids.shape[1]
        assert int(columns.max()) < both.loss.input_ids.shape[1] - 1, "what is predicted stands in the same row"
        assert both.label_names == NAMES
        assert [NAMES[label] for label in both.label_ids] == [note["specialty"] for note in rows]
        assert both.prompts.ids == both.loss.ids


def test_a_note_without_a_label_has_a_prompt() -> None:
    assert response.prompts([row([5, 6], specialty=None)]).input_ids.tolist() == [[5, 6]]


def test_an_answer_is_tokenized_once_for_each_label() -> None:
    calls: list[str] = []
    collator = Collator(lambda name: calls.append(name) or ANSWERS[name], PAD)
    for _ in range(3):
        collator.train([row([1]), row([2], "Radiology"), row([3])], 1)
    assert calls == ["Neurology", "Radiology"]


def test_the_chosen_label_is_the_one_that_is_trained() -> None:
    rows = Dataset.from_list([{**row([1, 2]), "specialties": ["Neurology", "Radiology"]}])
    chosen = BatchDataset(rows, response.train)[MicroBatch([0], 4, [1])]
    assert chosen.targets.tolist() == ANSWERS["Radiology"]


def test_the_loss_of_an_evaluation_is_that_of_the_first_label() -> None:
    batch = response.evaluate([TokenisedNote({**row([1, 2]), "specialties": ["Neurology", "Radiology"]})])
    assert batch.loss.targets.tolist() == ANSWERS["Neurology"]
    assert batch.loss.step_tokens == 2
