"""The table of predictions: its columns, that no answer is lost or written twice, and the memory that it takes."""

from __future__ import annotations

import csv
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import HEART, SPECIALTIES, notes

import medlit as package
from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.model.decoding import Answers
from medlit.model.module import SpecialtyClassifier
from medlit.predictions import shards
from medlit.predictions.shards import (
    ResumeKey,
    ShardWriter,
    answered_rows,
    check_table,
    find_shards,
    keep_whole_shards,
    lock_table,
    parts_in_order,
    shard_folder,
    start_shards,
    write_table,
)
from medlit.predictions.table import COLUMNS, FORMATS, Prediction, SetPrediction, make_predictions

if TYPE_CHECKING:
    from conftest import Medlit, Outcome

SOURCE = Path(package.__file__).parents[1]
LABELS = LabelSet.from_names(list(SPECIALTIES))
KEY = ResumeKey(notes=6, notes_hash="a", weights_hash="b", settings={"model.decoding.mode": "likelihood"})
Predict = Callable[..., "Outcome"]


# --- columns ----------------------------------------------------------------------------------------------------------


def predictions(
    probabilities: list[list[float]] | None, labels: list[int], abstain_below: float | None
) -> list[Prediction]:
    size = len(labels)
    prompts = Prompts(torch.zeros(size, 1), torch.ones(size, 1), list(range(size)), ["n"] * size, [0] * size)
    of_labels = None if probabilities is None else torch.tensor(probabilities)
    return make_predictions(prompts, Answers(torch.tensor(labels), ["?"] * size, of_labels), LABELS, abstain_below)


def test_an_answer_has_its_probability_its_margin_and_the_runner_up() -> None:
    rows = predictions([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.4, 0.5, 0.1]], [0, 0, 0], None)
    expected = [(0.6, 0.3, LABELS.names[1]), (0.5, 0.2, LABELS.names[2]), (0.4, -0.1, LABELS.names[1])]
    assert [(row.probability, row.margin, row.runner_up) for row in rows] == expected
    assert [row.specialty for row in rows] == [LABELS.names[0]] * 3
    assert not any(row.abstained for row in rows)


def test_an_uncertain_answer_is_not_filed_but_stays_visible() -> None:
    rows = predictions([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.499, 0.3, 0.201]], [0, 0, 0], 0.5)
    assert [row.abstained for row in rows] == [False, False, True]
    assert [row.specialty for row in rows] == [LABELS.names[0], LABELS.names[0], None]
    assert rows[2].answer == "?"
    assert (rows[2].probability, rows[2].runner_up) == (0.499, LABELS.names[1])


@pytest.mark.parametrize("probabilities", [None, [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]])
def test_an_answer_off_the_list_or_without_scores_has_no_probability(probabilities: list[list[float]] | None) -> None:
    listed, invalid = predictions(probabilities, [0, LABELS.invalid], None)
    assert listed.specialty == LABELS.names[0]
    assert (listed.probability is None) == (probabilities is None)
    assert (invalid.specialty, invalid.probability, invalid.margin, invalid.runner_up) == (None, None, None, None)
    assert invalid.abstained is False


# --- shards -----------------------------------------------------------------------------------------------------------


def row(place: int, id: str | None = None, **cells: Any) -> dict[str, Any]:  # noqa: ANN401 - any cell
    empty = {"specialty": None, "answer": "x", "probability": None, "margin": None, "runner_up": None}
    return {"row": place, "id": id or f"n{place}", **empty, "abstained": False, "cut_tokens": 0} | cells


def write_shard(table: Path, rank: int, *places: int) -> None:
    writer = ShardWriter(table, rank)
    writer.add([row(place, answer=f"of {rank}\n\u2028ä") for place in places])
    writer.flush()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table whose run has been started."""
    start_shards(tmp_path / "out.csv", KEY)
    return tmp_path / "out.csv"


def test_a_shard_cut_off_at_any_byte_does_not_count(table: Path) -> None:
    write_shard(table, 0, 5, 3)
    write_shard(table, 0, 1)
    first, second = found = find_shards(table)
    content = second.read_bytes()
    first = first.rename(table.with_name("first"))  # reading it so often would take as long again
    for cut in range(len(content)):
        second.write_bytes(content[:cut])
        assert keep_whole_shards(table) == []
    first = first.rename(found[0])
    assert keep_whole_shards(table) == [first]
    assert answered_rows([first], 6).tolist() == [False, False, False, True, False, True]
    second.write_bytes(content)
    assert keep_whole_shards(table) == [first, second]


def test_a_damaged_shard_does_not_count(table: Path) -> None:
    write_shard(table, 0, 5, 3, 2)
    write_shard(table, 1, 4)
    damaged, whole = find_shards(table)
    content = damaged.read_bytes()
    answer = content.index(b"of 0\n")
    for damage in (b"", b"\0" * len(content), b"{}\n", content[:answer] + b"as" + content[answer + 2 :]):
        damaged.write_bytes(damage)
        assert keep_whole_shards(table) == [whole]


def test_a_run_without_its_resume_key_is_no_interrupted_run(table: Path) -> None:
    write_shard(table, 0, 5)
    assert shards.read_resume_key(table) == KEY
    (key_file,) = shard_folder(table).glob("*.json")
    for content in (b"", b"[1]", b"{}", b"\xff\xfe"):
        key_file.write_bytes(content)
        assert shards.read_resume_key(table) is None
    key_file.unlink()
    assert shards.read_resume_key(table) is None
    assert find_shards(table) == []


def test_shards_are_readable_by_their_owner_alone_and_no_other_file_is_one(table: Path) -> None:
    write_shard(table, 0, 1)
    write_shard(table, 12, 2)
    for name in (".rank00000-abc.parquet", "rank00000-000001.parquet.tmp", "other"):
        (shard_folder(table) / name).touch()
    start_shards(table.with_name("other.csv"), KEY)
    write_shard(table.with_name("other.csv"), 0, 1)
    found = find_shards(table)
    assert [path.name for path in found] == ["rank00000-000000.parquet", "rank00012-000000.parquet"]
    assert {path.stat().st_mode & 0o777 for path in found} == {0o600}
    assert shard_folder(table).stat().st_mode & 0o777 == 0o700


def test_rows_are_written_every_few_seconds(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(shards.time, "monotonic", lambda: now[0])
    writer = ShardWriter(table, 0)
    for place in range(6):
        now[0] += shards.FLUSH_SECONDS / 2
        writer.add([row(place)])
    assert answered_rows(find_shards(table), 6).all()
    assert len(find_shards(table)) == 3
    assert shards.FLUSH_SECONDS <= 5


# --- the resume key ---------------------------------------------------------------------------------------------------


def test_settings_of_another_version_are_not_compared() -> None:
    newer = replace(KEY, settings=KEY.settings | {"model.decoding.new": 1})
    assert newer.difference(KEY) is None
    assert KEY.difference(newer) is None
    other = replace(newer, settings=newer.settings | {"model.decoding.mode": "generate"})
    assert other.difference(KEY) == 'model.decoding.mode was "likelihood" and is "generate"'


# --- the table --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, whatever its format."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_of_any_processes_become_one_table_in_the_order_of_the_source(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"out{suffix}"
    start_shards(table, KEY)
    for rank, places in ((0, (4, 0)), (3, (5, 2, 4)), (11, ())):
        write_shard(table, rank, *places)
    found = find_shards(table)
    assert answered_rows(found, 6).tolist() == [True, False, True, False, True, True]
    write_table(found, 6, table)
    assert [line["id"] for line in read(table)] == ["n0", "n2", "n4", "n5"]
    assert [line["answer"][3] for line in read(table)] == ["0", "3", "3", "3"]
    assert read(table)[0]["answer"] == "of 0\n\u2028ä"


def test_a_set_holds_the_labels_that_reach_the_threshold_the_likeliest_first() -> None:
    prompts = Prompts(torch.zeros(3, 1), torch.ones(3, 1), [0, 1, 2], ["n"] * 3, [0] * 3)
    p = torch.tensor([[0.25, 0.6, 0.15], [0.3, 0.3, 0.4], [0.2, 0.1, 0.7]])
    answers, (first, second, third) = Answers(p.argmax(dim=1), ["?"] * 3, p), LABELS.names
    for threshold, expected in (
        (0.25, [([second, first], [0.6, 0.25]), ([third, first, second], [0.4, 0.3, 0.3]), ([third], [0.7])]),
        (0.65, [([], []), ([], []), ([third], [0.7])]),
    ):
        rows = make_predictions(prompts, answers, LABELS, None, threshold)
        assert [(row.set, row.set_probabilities) for row in rows if isinstance(row, SetPrediction)] == expected
        assert [row.set_size for row in rows if isinstance(row, SetPrediction)] == [len(each[0]) for each in expected]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_has_columns_of_sets_only_where_they_are_made(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"out{suffix}"
    start_shards(table, KEY)
    writer = ShardWriter(table, 0)
    writer.add([row(0, set=["=Heart", "Bones"], set_size=2, set_probabilities=[0.6, 0.25])])
    writer.flush()
    write_table(find_shards(table), 1, table, ";")
    (found,) = read(table)
    is_csv = suffix == ".csv"
    assert found["set"] == ("'=Heart;Bones" if is_csv else ["=Heart", "Bones"])
    assert int(found["set_size"]) == 2
    assert found["set_probabilities"] == ("0.6;0.25" if is_csv else [0.6, 0.25])
    write_table(find_shards(table), 1, table)
    assert tuple(read(table)[0]) == COLUMNS


@pytest.mark.parametrize(
    "cell",
    [
        "=1+1",
        "+1+1",
        "-1-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        '=HYPERLINK("http://x","y")',
        "-inf",
        "- 5",
        "+49 30 1",
        "-5\n",
    ],
)
def test_a_text_that_a_spreadsheet_would_run_is_escaped_in_csv_alone(tmp_path: Path, cell: str) -> None:
    for suffix in FORMATS:
        table = tmp_path / f"out{suffix}"
        start_shards(table, KEY)
        writer = ShardWriter(table, 0)
        writer.add([row(0, id=cell, answer=cell, runner_up=cell, margin=-0.25)])
        writer.flush()
        write_table(find_shards(table), 1, table)
        (found,) = read(table)
        shown = f"'{cell}" if suffix == ".csv" else cell
        assert [found[name] for name in ("id", "answer", "runner_up")] == [shown] * 3
        assert float(found["margin"]) == -0.25, "a number is no text"


@pytest.mark.parametrize("cell", ["-5", "+5", "-1e3", "-1.5E-07", "+.5", "-5.", "007", " =1", "a-5", "'-5"])
def test_a_number_is_no_formula(tmp_path: Path, cell: str) -> None:
    table = tmp_path / "out.csv"
    start_shards(table, KEY)
    writer = ShardWriter(table, 0)
    writer.add([row(0, id=cell, specialty=cell, answer=cell, runner_up=cell)])
    writer.flush()
    write_table(find_shards(table), 1, table)
    (found,) = read(table)
    assert [found[name] for name in ("id", "specialty", "answer", "runner_up")] == [cell] * 4


def write_shards(table: Path, notes: int) -> None:
    start_shards(table, KEY)
    places = np.random.default_rng(0).permutation(notes).tolist()
    for rank in range(2):
        writer, mine = ShardWriter(table, rank), places[rank::2]
        for start in range(0, len(mine), 1_000):
            writer.add([row(i, answer=HEART * 4, specialty=HEART) for i in mine[start : start + 1_000]])
            writer.flush()


@pytest.mark.parametrize("suffix", FORMATS)
def test_python_memory_does_not_grow_with_the_answers(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for size in (12_000, 24_000):
        table = tmp_path / f"{size}{suffix}"
        write_shards(table, size)
        tracemalloc.start()
        try:
            write_table(find_shards(table), size, table)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(read(table)) == size
    assert (peaks[1] - peaks[0]) / 12_000 < 100, "bytes a note; as an object it takes 1000"


def test_arrow_holds_the_rows_of_one_pass(tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    write_shards(table, 48_000)

    def peak(rows_per_pass: int) -> int:
        before = pa.total_allocated_bytes()
        parts = parts_in_order(find_shards(table), 48_000, rows_per_pass)
        return max(pa.total_allocated_bytes() for _ in parts) - before

    assert peak(4_000) < peak(48_000) / 3


# --- what a table may not replace -------------------------------------------------------------------------------------


def test_notes_are_never_replaced_however_they_are_spelled_or_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    source = tmp_path / "notes" / "train.csv"
    source.write_text("x")
    (tmp_path / "link.csv").symlink_to(source)
    (tmp_path / "hard.csv").hardlink_to(source)
    (tmp_path / "folder").symlink_to("notes")
    spellings = ["notes/train.csv", "./notes/../notes/train.csv", source, "link.csv", "hard.csv", "folder/train.csv"]
    for spelling in spellings:
        for named in ("notes", "folder", "notes/*.csv", "**/*.csv", str(source), "link.csv", "hard.csv"):
            with pytest.raises(UserError, match=r"output: .* is among the notes of"):
                check_table(Path(spelling), [named], overwrite=True)
    for new in ("notes/test.csv", "folder/test.jsonl"):  # the next run would read it
        with pytest.raises(UserError, match="is among the notes of notes"):
            check_table(Path(new), ["builtin", "notes"], overwrite=True)
    for free in ("out.csv", "notes/filed/out.csv", "notes2/train.csv"):
        check_table(Path(free), ["notes", "notes/*.csv", "owner/name", "missing.csv"], overwrite=False)


def test_an_existing_table_is_replaced_on_request_alone(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("by hand")
    with pytest.raises(UserError, match=r"out\.csv exists; name another file, or add --overwrite to replace it\."):
        check_table(tmp_path / "out.csv", [], overwrite=False)
    check_table(tmp_path / "out.csv", [], overwrite=True)
    with pytest.raises(UserError, match="is not a file"):
        check_table(tmp_path, [], overwrite=True)


# --- a run that is interrupted ----------------------------------------------------------------------------------------


WEIGHED = ["--ckpt_path", "best", "--model.decoding.mode", "likelihood", "--data.batching.eval_batch_size", "1"]


@pytest.fixture
def predict(run_medlit: Medlit, run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """File the eight test notes, one a batch and one a shard, into out.csv."""
    monkeypatch.setattr(shards, "FLUSH_SECONDS", 0)
    given = ["predict", "--config", tiny_config, *WEIGHED, "--output", "out.csv"]
    return lambda *arguments: run_medlit(*given, *arguments)


@pytest.fixture
def answered_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the notes that the model answers, in order."""
    step, found = SpecialtyClassifier.predict_step, []

    def counting(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        found.extend(batch.ids)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SpecialtyClassifier, "predict_step", counting)
    return found


def killed(predict: Predict, target: str, calls: int) -> list[Path]:
    """Kill a process after so many calls of a function; returns the shards that it leaves."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                real, left = pkgutil.resolve_name(target), [calls]

                def killing(*arguments: object) -> object:
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return real(*arguments)

                patch.setattr(target, killing)
                predict()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert shard_folder(Path("out.csv")).exists()
    return find_shards(Path("out.csv"))


def ids_in(found: list[Path]) -> list[str]:
    return [id for path in found for id in pq.read_table(path)["id"].to_pylist()]


ADD = "medlit.predictions.shards.ShardWriter.add"  # batch by batch
JOIN = "medlit.predictions.shards.write_table"


@pytest.fixture(scope="module")
def whole(fitted: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of an uninterrupted run; each test has a copy of the same fit."""
    from medlit.cli.cli import main

    folder = tmp_path_factory.mktemp("whole")
    run, table = shutil.copytree(fitted, folder / "run"), folder / "out.csv"
    main(["predict", "--config", str(tiny_config), "--run_dir", str(run), *WEIGHED, "--output", str(table)])
    return table.read_bytes()


@pytest.mark.parametrize(
    ("target", "calls", "torn", "kept"), [(ADD, 0, 0, 0), (ADD, 3, 0, 3), (ADD, 5, 7, 4), (JOIN, 0, 0, 8)]
)
def test_a_killed_run_is_resumed_and_neither_repeats_nor_loses_a_note(
    predict: Predict, whole: bytes, answered_ids: list[str], target: str, calls: int, torn: int, kept: int
) -> None:
    found = killed(predict, target, calls)
    assert not Path("out.csv").exists()
    if torn:
        os.truncate(found[-1], found[-1].stat().st_size - torn)
        found.pop()
    before = ids_in(found)
    outcome = predict("--resume")
    assert outcome.code == 0
    assert f"{kept} of 8 notes were answered before" in outcome.err
    assert outcome.err.rstrip().endswith("medlit: written: out.csv")
    assert Path("out.csv").read_bytes() == whole
    everyone = {note["id"] for note in notes()["test"]}
    assert len(before) == kept
    if kept < 8:
        assert set(answered_ids) == everyone - set(before)
        assert len(answered_ids) == 8 - kept
    assert not list(Path().glob(".out*"))


def test_without_resume_the_shards_of_an_earlier_run_are_removed(
    predict: Predict, whole: bytes, answered_ids: list[str]
) -> None:
    left = killed(predict, ADD, 2)
    shutil.copy(left[0], left[0].with_name("rank00005-000000.parquet"))
    assert predict().code == 0
    assert len(answered_ids) == 8
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_of_two_runs_at_once_the_second_is_refused_and_the_first_keeps_its_answers(
    predict: Predict, whole: bytes, answered_ids: list[str], resume: tuple[str, ...]
) -> None:
    left = {path: path.read_bytes() for path in killed(predict, ADD, 3)}
    with lock_table(Path("out.csv")):
        outcome = predict(*resume)
    assert outcome.code == 2
    assert "output: another 'medlit predict' is writing out.csv; name another file" in outcome.err
    assert {path: path.read_bytes() for path in find_shards(Path("out.csv"))} == left
    assert not answered_ids
    assert predict("--resume").code == 0
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


def test_a_later_run_replaces_a_table_on_request_alone(predict: Predict, answered_ids: list[str]) -> None:
    Path("out.csv").write_text("by hand")
    for resume in ([], ["--resume"]):
        outcome = predict(*resume)
        assert outcome.code == 2
        assert "output: out.csv exists; name another file, or add --overwrite" in outcome.err
    assert Path("out.csv").read_text() == "by hand"
    assert not answered_ids
    assert predict("--overwrite").code == 0
    assert len(read(Path("out.csv"))) == 8
    assert "overwrite: false" in Path("logs/tiny/version_0/config_predict.yaml").read_text(), "not the next time"


def test_a_table_that_another_run_has_just_written_stays(
    predict: Predict, answered_ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "lock_table", lambda table: (table.write_text("theirs"), lock_table(table))[1])
    assert "out.csv exists" in predict().err
    assert Path("out.csv").read_text() == "theirs"
    assert not answered_ids
    assert not list(Path().glob(".out*"))


def test_a_table_behind_a_link_is_written_and_resumed_there(predict: Predict, whole: bytes) -> None:
    Path("disk").mkdir()
    Path("out.csv").symlink_to("disk/out.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_table", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
        assert predict().code == 2
    assert predict("--resume").code == 0
    assert Path("out.csv").is_symlink()
    assert Path("disk/out.csv").read_bytes() == whole
    assert os.listdir("disk") == ["out.csv"]


def test_resume_without_an_interrupted_run_starts_over(predict: Predict, whole: bytes, answered_ids: list[str]) -> None:
    outcome = predict("--resume")
    assert "there is no interrupted run beside out.csv; starting with the first note" in outcome.err
    assert len(answered_ids) == 8
    assert Path("out.csv").read_bytes() == whole


def test_the_shards_of_another_number_of_processes_count(
    predict: Predict, whole: bytes, answered_ids: list[str]
) -> None:
    found = killed(predict, ADD, 5)
    names = ("00000-000000", "00001-000000", "00001-000001", "00004-000000", "00007-000003")
    for path, name in zip(found, names, strict=True):
        path.rename(path.with_name(f"rank{name}.parquet"))
    os.truncate(path.with_name("rank00007-000003.parquet"), 20)
    assert predict("--resume").code == 0
    assert len(answered_ids) == 8 - 4
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--model.decoding.mode", "constrained"], 'model.decoding.mode was "likelihood" and is "constrained"'),
        (["--model.decoding.abstain_below", "0.5"], "model.decoding.abstain_below was null and is 0.5"),
        (["--data.predict.source", "validation"], "the notes have changed"),
        (["--ckpt_path", "other.ckpt"], "the weights or their temperature have changed"),
    ],
)
def test_an_interrupted_run_with_other_inputs_is_not_resumed(
    predict: Predict, run: Path, arguments: list[str], difference: str
) -> None:
    left = {path: path.read_bytes() for path in killed(predict, ADD, 2)}
    if "other.ckpt" in arguments:
        checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        torch.save(checkpoint | {"global_step": 99}, "other.ckpt")
    outcome = predict("--resume", *arguments)
    assert outcome.code == 2
    message = outcome.err.strip().splitlines()[-1]
    assert message.startswith("medlit: resume: the interrupted run beside out.csv had other inputs (")
    assert difference in message
    assert {path: path.read_bytes() for path in find_shards(Path("out.csv"))} == left
    assert not Path("out.csv").exists()


@pytest.mark.parametrize(
    "setting",
    ["data.batching.eval_batch_size=4", "data.batching.micro_batch_size=3", "model.language_model.offload=none"],
)
def test_settings_of_memory_may_change_before_a_resume(
    predict: Predict, whole: bytes, answered_ids: list[str], setting: str
) -> None:
    killed(predict, ADD, 2)
    assert predict("--resume", f"--{setting}").code == 0
    assert len(answered_ids) == 6
    assert [row["answer"] for row in read(Path("out.csv"))] == [
        row["answer"] for row in csv.DictReader(io.StringIO(whole.decode()))
    ]


@pytest.mark.parametrize("stopped", ["SIGTERM", "an error"])
def test_a_run_that_stops_says_how_to_continue(
    predict: Predict, whole: bytes, answered_ids: list[str], monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    step = SpecialtyClassifier.predict_step

    def stopping(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        if batch_idx == 2 and stopped == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif batch_idx == 2:
            raise UserError("the disk is full")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(shards, "FLUSH_SECONDS", 3600)
    with monkeypatch.context() as patch:
        patch.setattr(SpecialtyClassifier, "predict_step", stopping)
        outcome = predict()
    assert outcome.code == (128 + signal.SIGTERM if stopped == "SIGTERM" else 2)
    assert "the answers so far are kept; the same command with --resume continues" in outcome.err
    assert not Path("out.csv").exists()
    before = len(answered_ids)
    assert predict("--resume").code == 0
    assert len(answered_ids) == 8 == before + 8 - (3 if stopped == "SIGTERM" else 2)
    assert Path("out.csv").read_bytes() == whole


def test_a_run_that_stops_before_its_first_answer_leaves_nothing(
    predict: Predict, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Answers:
        raise UserError("no")

    monkeypatch.setattr(SpecialtyClassifier, "predict_step", failing)
    outcome = predict()
    assert "--resume" not in outcome.err
    assert not list(Path().glob(".out*"))


def test_a_run_in_its_own_folder_is_kept_and_found_again(
    run_medlit: Medlit, run: Path, tiny_config: Path, answered_ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SpecialtyClassifier.predict_step

    def failing(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        if batch_idx == 1:
            raise UserError("the GPU is full")
        return step(self, batch, batch_idx)

    adapted = ["predict", "--config", tiny_config, "--model.adapter", run / "adapter"]
    with monkeypatch.context() as patch:
        patch.setattr(SpecialtyClassifier, "predict_step", failing)
        assert run_medlit(*adapted).code == 2
    assert run_medlit(*adapted, "--resume").code == 0
    found = read(run.with_name("version_1") / "predictions.csv")
    assert [row["id"] for row in found] == [note["id"] for note in notes()["test"]]
    assert len(answered_ids) == 8
    assert not run.with_name("version_2").exists()


@pytest.mark.slow
def test_two_processes_resume_what_one_left(predict: Predict, whole: bytes, tiny_config: Path) -> None:
    killed(predict, ADD, 3)
    ddp = SOURCE.parent / "configs" / "hardware" / "ddp.yaml"
    two = ["--config", ddp, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--output", "out.csv"]
    weighed = ["--model.decoding.mode", "likelihood", "--data.batching.eval_batch_size", "1", "--ckpt_path", "best"]
    best = ["--run_dir", "logs/tiny/version_0"]
    command = [sys.executable, "-m", "medlit", "predict", "--config", tiny_config, *two, *weighed, *best, "--resume"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    assert "3 of 8 notes were answered before" in done.stderr
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


# --- one note, and abstaining -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constrained", "likelihood"])
def test_one_note_prints_the_answer_and_its_probability(
    run_medlit: Medlit, run: Path, tiny_config: Path, mode: str
) -> None:
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--model.decoding.mode", mode]
    arguments += ["--model.decoding.abstain_below", "1", "--data.predict.text", "Patient 30 years old: heart pain."]
    outcome = run_medlit("predict", *arguments)
    assert outcome.out.removesuffix("\n") in SPECIALTIES
    probability = re.search(
        r"medlit: probability 0\.\d{3}, margin -?0\.\d{3}, runner-up (.+); model\.decoding\.abstain_below would",
        outcome.err,
    )
    assert probability is not None
    assert probability[1] in SPECIALTIES


def test_uncertain_answers_are_withheld(predict: Predict) -> None:
    assert predict("--model.decoding.abstain_below", "1").code == 0
    found = read(Path("out.csv"))
    assert {(row["specialty"], row["abstained"]) for row in found} == {("", "True")}
    assert {row["answer"] for row in found} <= set(SPECIALTIES)
    assert all(0 < float(row["probability"]) < 1 and row["runner_up"] != row["answer"] for row in found)


def test_written_answers_are_not_kept_in_memory(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning collects what predict_step returns, for a million notes as for eight."""
    step, given = SpecialtyClassifier.predict_step, []
    alive = []

    def watched(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        alive.append(sum(labels() is not None for labels in given))
        answers = step(self, batch, batch_idx)
        given.append(weakref.ref(answers.label_ids))
        return answers

    monkeypatch.setattr(SpecialtyClassifier, "predict_step", watched)
    assert predict().code == 0
    assert len(alive) == 8
    assert max(alive) <= 1
