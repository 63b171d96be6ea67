"""From a table to batches: what reaches the model, what is refused, and where a resumed epoch continues."""

from __future__ import annotations

import functools
import inspect
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import BONE, BRAIN, HEART, SPLITS, notes, tiny_datamodule, write_csv

from medlit.data.collate import Batch
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.samplers import micro_batches_per_step
from medlit.errors import UserError

Make = Callable[..., TranscriptionDataModule]
SECRET = "Zebra"


@pytest.fixture
def make(llama: Path, notes_folder: Path) -> Make:
    """A datamodule of the forty notes with the tiny model's tokenizer; settings override."""
    return functools.partial(tiny_datamodule, notes_folder, llama)


def on_rank(
    data: TranscriptionDataModule, rank: int, world_size: int, step: int = 0, device: str = "cpu"
) -> TranscriptionDataModule:
    """As if Lightning ran it as one of several processes."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy, global_step=step)  # type: ignore[assignment]
    return data


def read(data: TranscriptionDataModule, ids: torch.Tensor) -> str:
    return str(data.prompt.tokenizer.decode(ids.tolist()))


def all_text(data: TranscriptionDataModule) -> str:
    """Everything that any batch of any command shows to the model."""
    data.setup("fit")
    evaluated = [batch for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    prompts = [batch.prompts for batch in evaluated] + list(data.predict_dataloader())
    tensors = [batch.input_ids for batch in [*data.train_dataloader(), *(batch.loss for batch in evaluated), *prompts]]
    return "".join(read(data, row) for tensor in tensors for row in tensor)


def test_a_datamodule_has_at_most_twelve_settings() -> None:
    assert len(inspect.signature(TranscriptionDataModule).parameters) <= 12


# --- what gets to the model -------------------------------------------------------------------------------------------


def test_no_other_column_reaches_the_model(make: Make, tmp_path: Path) -> None:
    for split, rows in notes().items():
        extra = {"keywords": SECRET, "description": SECRET, "text": SECRET}
        write_csv(tmp_path / f"{split}.csv", [row | extra for row in rows])
    assert SECRET not in all_text(make(source=str(tmp_path)))
    assert SECRET in all_text(make(source=str(tmp_path), columns={"text": "keywords"})), "the test would see it"


def test_no_prompt_contains_its_answer(make: Make) -> None:
    data = make()
    data.setup("fit")
    for batch in data.val_dataloader():
        specialties = [batch.label_names[label] for label in batch.label_ids]
        answers = "".join(f"{name}{data.prompt.tokenizer.eos_token}" for name in specialties)
        assert read(data, batch.loss.targets) == answers
        for prompt in batch.prompts.input_ids:
            assert read(data, prompt).endswith("### Response:\n")


def test_labels_may_be_read_after_notes_that_have_none(make: Make, tmp_path: Path) -> None:
    """As in a notebook that predicts and then tests."""
    rows = [{"id": "new", "transcription": "Palpitations."}]
    data = make(predict={"source": str(write_csv(tmp_path / "new.csv", rows))})
    data.setup("predict")
    assert [batch.ids for batch in data.predict_dataloader()] == [["new"]]
    data.setup("test")
    assert sum(len(batch.label_ids) for batch in data.test_dataloader()) == len(notes()["test"])


def test_an_epoch_shows_every_note_of_a_split_once(make: Make) -> None:
    data = make()
    data.setup("fit")
    ids = {split: [row["id"] for row in rows] for split, rows in notes().items()}
    assert sorted(i for batch in data.train_dataloader() for i in batch.ids) == sorted(ids["train"])
    assert sorted(i for batch in data.val_dataloader() for i in batch.prompts.ids) == sorted(ids["validation"])
    assert sorted(i for batch in data.test_dataloader() for i in batch.loss.ids) == sorted(ids["test"])
    assert sorted(i for batch in data.predict_dataloader() for i in batch.ids) == sorted(ids["test"])


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_the_step_s_tokens_are_those_that_its_micro_batches_supervise(make: Make, mask_prompt: bool) -> None:
    data = make(mask_prompt=mask_prompt)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    for step in (batches[:2], batches[2:4], batches[4:]):
        labelled = sum(len(batch.targets) for batch in step)
        assert {batch.step_tokens for batch in step} == {labelled}


@pytest.mark.parametrize(("class_balance", "share"), [("none", 0.125), ("inverse", 0.5)])
def test_class_balance_draws_a_rare_specialty_more_often(
    make: Make, tmp_path: Path, class_balance: str, share: float
) -> None:
    rows = [row | {"medical_specialty": HEART if place < 3 else BONE} for place, row in enumerate(notes()["train"])]
    rare = {row["id"] for row in rows[:3]}
    source = str(write_csv(tmp_path / "train.csv", rows).parent)
    data = make(source=source, split={"kind": "official"}, batching={"class_balance": class_balance})
    data.setup("fit")
    shown = [i for batch in data.train_dataloader() for i in batch.ids]
    assert len(shown) == 24
    assert len(data.train_dataloader()) == data.steps_per_epoch * 2
    assert sum(i in rare for i in shown) == 24 * share


def test_packed_steps_hold_the_notes_of_padded_ones(make: Make) -> None:
    shown = []
    for packing in (None, False, True):
        data = make(batching={"packing": packing})
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert {batch.parts > 0 for batch in batches} == {packing is True}, "a CPU pads"
        shown.append([sorted(i for batch in batches[at : at + 2] for i in batch.ids) for at in (0, 2, 4)])
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize(
    ("model_type", "capability", "packed"),
    [("llama", (8, 0), True), ("llama", (7, 5), False), ("mistral", (9, 0), True), ("olmo2", (9, 0), False)],
)
def test_card_and_base_model_decide_whether_notes_are_packed(
    make: Make,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    capability: tuple[int, int],
    packed: bool,
) -> None:
    """What the model cannot take packed is grouped by length: notes dealt for packing and padded would waste it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    folder = shutil.copytree(llama, tmp_path / "base")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
    data = on_rank(make(tokenizer={"base_model": str(folder)}), 0, 1, device="cuda")
    data.setup("fit")
    assert data.train_dataloader().sampler.packed is packed  # type: ignore[attr-defined]


def test_a_long_note_is_cut_and_the_cut_is_counted(make: Make) -> None:
    data = make(tokenizer={"max_length": 128})
    data.setup("fit")
    cut = {row["id"]: row["cut_tokens"] for row in data.rows("train")}
    assert cut["train-00"] > 0
    assert sum(count > 0 for count in cut.values()) == 1
    assert max(length for batch in data.train_dataloader() for length in batch.lengths) <= 128


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_loader(make: Make, world_size: int) -> None:
    ranks = [on_rank(make(), rank, world_size) for rank in range(world_size)]
    for data in ranks:
        data.setup("fit")
    trained = [[i for batch in data.train_dataloader() for i in batch.ids] for data in ranks]
    validated = [[i for batch in data.val_dataloader() for i in batch.loss.ids] for data in ranks]
    for shares, size in ((trained, SPLITS["train"]), (validated, SPLITS["validation"])):
        assert sum(map(len, shares)) == size
        assert len({i for share in shares for i in share}) == size
    # In training it is padded tokens that are shared evenly, not notes.
    assert {len(share) for share in validated} == {SPLITS["validation"] // world_size}
    assert all(trained)
    assert micro_batches_per_step(ranks[0].batching, world_size) == -(-8 // world_size // 4)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_with_fewer_notes_than_processes_is_refused_on_all_of_them(make: Make, split: str) -> None:
    size = SPLITS[split]
    for rank in range(size + 1):
        data = on_rank(make(), rank, size + 1)
        data.setup(None)
        loader = data.val_dataloader if split == "validation" else data.test_dataloader
        with pytest.raises(UserError, match=f"the {split} split has {size} notes, too few for {size + 1} processes"):
            loader()
    assert len(on_rank(data, size - 1, size).val_dataloader()) == 1


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_training_split(make: Make) -> None:
    data = make()
    data.setup("fit")
    assert data.label_set is not None
    assert data.label_set.names == (HEART, BRAIN, BONE)


def test_a_label_that_is_not_in_training_is_refused_with_split_and_note(make: Make, tmp_path: Path) -> None:
    for split, rows in notes().items():
        if split == "test":
            rows[5]["medical_specialty"] = "Urology"
        write_csv(tmp_path / f"{split}.csv", rows)
    wanted = "data.columns.label: the test split has the label 'Urology' (first in note 'test-05')"
    with pytest.raises(UserError, match=re.escape(wanted)):
        make(source=str(tmp_path)).setup("fit")


def test_a_label_column_with_one_class_is_refused(make: Make, tmp_path: Path) -> None:
    rows = [row | {"medical_specialty": BONE} for row in notes()["train"]]
    with pytest.raises(UserError, match="label"):
        make(source=str(write_csv(tmp_path / "all.csv", rows))).setup("fit")


def test_a_missing_split_is_refused_when_it_is_needed(make: Make, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_csv(tmp_path / f"{split}.csv", notes()[split])
    data = make(source=str(tmp_path), split={"kind": "official"})
    data.setup("fit")
    data.train_dataloader()
    with pytest.raises(UserError, match=r"data\.source: .* has no test split"):
        data.test_dataloader()


def test_a_source_without_a_training_split_is_refused(make: Make, tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", notes()["test"])
    with pytest.raises(UserError, match="train"):
        make(source=str(tmp_path), split={"kind": "official"}).setup("test")


# --- predict ----------------------------------------------------------------------------------------------------------


def predicted_notes(data: TranscriptionDataModule) -> list[str]:
    """The notes that predict classifies."""
    data.setup("predict")
    prompts = [
        row[mask == 1] for batch in data.predict_dataloader() for row, mask in zip(batch[0], batch[1], strict=True)
    ]
    return [read(data, prompt).split("### Input:\n")[1].removesuffix("\n\n### Response:\n") for prompt in prompts]


def test_one_note_from_the_command_line_or_standard_input(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"  A knee,\r\nswollen.\n")))
    assert (
        predicted_notes(make(predict={"text": "-"}))
        == ["A knee,\nswollen."]
        == predicted_notes(make(predict={"text": "A knee,\nswollen."}))
    )


def test_one_note_reads_no_table(make: Make) -> None:
    assert predicted_notes(make(predict={"text": "A knee."}, source="no/such/table.csv")) == ["A knee."]


def test_a_note_that_is_not_utf_8_is_repaired_or_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert predicted_notes(make(predict={"text": "A knee \udcb0."})) == ["A knee \ufffd."], (
        "an argument in another encoding"
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"38.5\xb0"), encoding="utf-8"))
    with pytest.raises(UserError, match=r"data\.predict\.text: the standard input is not UTF-8"):
        make(predict={"text": "-"}).setup("predict")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_note_is_refused(make: Make, text: str) -> None:
    with pytest.raises(UserError, match=r"data\.predict\.text: the note is empty"):
        make(predict={"text": text}).setup("predict")


def test_predict_reads_a_table_without_labels_and_nothing_else(make: Make, tmp_path: Path) -> None:
    rows = [{"id": f"n{i}", "transcription": f"Note {i}."} for i in range(5)]
    table = write_csv(tmp_path / "new.csv", rows)
    data = make(predict={"source": str(table)}, source="no/such/table.csv")
    assert sorted(predicted_notes(data)) == [row["transcription"] for row in rows]
    assert data.label_set is None
    assert sorted(i for batch in data.predict_dataloader() for i in batch.ids) == [row["id"] for row in rows]


@pytest.mark.parametrize("source", ["text", "table"])
def test_preparing_reads_no_more_than_predicting(make: Make, tmp_path: Path, source: str) -> None:
    table = write_csv(tmp_path / "new.csv", [{"transcription": "A knee."}])
    what = {"text": "A knee."} if source == "text" else {"source": str(table)}
    data = make(source="no/such/table.csv", predict=what)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"))  # type: ignore[assignment]
    data.prepare_data()


@pytest.mark.parametrize("done", [0, 3, 5, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_answered_notes_are_skipped_and_every_process_gets_a_note(make: Make, done: int, world_size: int) -> None:
    order = np.random.default_rng(0).permutation(8)
    rows = []
    for rank in range(world_size):
        data = on_rank(make(), rank, world_size)
        data.setup("predict")
        data.answered = np.isin(np.arange(8), order[:done])
        mine = [row for batch in data.predict_dataloader() for row in batch.rows]
        assert mine, "Lightning would end here"
        rows += mine
    left = set(order[done:].tolist())
    assert set(rows) == left or (done == 8 and len(set(rows)) == 1)
    assert len(rows) == max(len(left), world_size)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_epoch_continues_after_the_last_trained_step(make: Make) -> None:
    data = make()
    data.setup("fit")
    whole = [batch.ids for batch in data.train_dataloader()]
    for trained in range(7):  # 3 steps an epoch of 2 micro-batches
        state = on_rank(make(), 0, 1, step=trained).state_dict()
        resumed = make()
        resumed.load_state_dict(state)
        resumed.setup("fit")
        loader = resumed.train_dataloader()
        loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
        assert [batch.ids for batch in loader] == whole[trained % 3 * 2 :]
        assert [batch.ids for batch in loader] == whole, "the next epoch is whole"
        assert len(loader) == len(whole)


def test_a_resumed_epoch_has_its_own_shuffle_before_set_epoch(make: Make) -> None:
    """Worker processes ask for batches as soon as there is an iterator."""
    data = make()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    third = [batch.ids for batch in loader]
    for workers in (0, 1):
        resumed = make(batching={"num_workers": workers})
        resumed.load_state_dict({"optimizer_steps": 7})
        resumed.setup("fit")
        assert [batch.ids for batch in resumed.train_dataloader()] == third[2:]


# --- several labels a note --------------------------------------------------------------------------------------------


def overlapping(folder: Path) -> str:
    """The forty notes, of which those about the heart stand under a second specialty in a second row."""
    for split, rows in notes().items():
        again = [row | {"id": f"{row['id']}-b", "medical_specialty": BRAIN} for row in rows]
        second = [row for row, first in zip(again, rows, strict=True) if first["medical_specialty"] == HEART]
        write_csv(folder / f"{split}.csv", [*rows, *second])
    return str(folder)


@pytest.mark.parametrize("class_balance", ["none", "inverse"])
def test_one_label_a_note_gives_the_batches_it_gave(make: Make, tmp_path: Path, class_balance: str) -> None:
    for split, rows in notes().items():
        write_csv(tmp_path / f"{split}.csv", [row for row in rows if row["id"] != "train-04"])
    balance = {"class_balance": class_balance}
    before = make(source=str(tmp_path), batching=balance)
    after = make(source=str(tmp_path), label_conflicts="merge", batching=balance)
    for data in (before, after):
        data.setup("fit")
    assert before.fingerprint == after.fingerprint
    for one, other in zip(before.train_dataloader(), after.train_dataloader(), strict=True):
        assert (one.ids, one.lengths, one.step_tokens) == (other.ids, other.lengths, other.step_tokens)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_fit_trains_the_labels_that_an_uninterrupted_one_does(
    make: Make, tmp_path: Path, packing: bool
) -> None:
    def batches(step: int) -> list[Batch]:
        data = make(source=overlapping(tmp_path), label_conflicts="merge", batching={"packing": packing})
        data.load_state_dict({"optimizer_steps": step})
        data.setup("fit")
        return list(data.train_dataloader())

    whole, rest, second = batches(0), batches(1), batches(2)
    assert len(whole) == 2 * 2, "24 rows and 8 more are 23 notes, one of which is in two rows of the forty already"
    for batch, again in zip(whole[2:], rest, strict=True):
        assert batch.targets.tolist() == again.targets.tolist()
        assert batch.input_ids.tolist() == again.input_ids.tolist()
    assert sum(len(batch.lengths) for batch in whole) == 16
    assert sorted(i for b in whole for i in b.ids) != sorted(i for b in second for i in b.ids), "another epoch"
    if packing:
        assert len({batch.parts for batch in whole if batch.parts}) == 1


def test_an_evaluation_knows_all_labels_of_a_note(make: Make, tmp_path: Path) -> None:
    data = make(source=overlapping(tmp_path), label_conflicts="merge")
    data.setup("validate")
    for batch in data.val_dataloader():
        for first, own in zip(batch.label_ids.tolist(), batch.accepted.tolist(), strict=True):
            names = {batch.label_names[label] for label in own}
            assert own[0] == first
            assert names == ({HEART, BRAIN} if batch.label_names[first] == HEART else {batch.label_names[first]})


def test_a_table_full_of_several_labels_is_named_once(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(source=overlapping(tmp_path))
    for stage in ("fit", "validate"):
        data.setup(stage)
    assert capsys.readouterr().err.count("texts carry several labels, so that one answer can be right for") == 1
    make(source=str(tmp_path), label_conflicts="merge").read_splits()
    assert "texts carry several labels" not in capsys.readouterr().err
