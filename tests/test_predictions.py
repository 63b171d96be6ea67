"""Predictions as a table: what its columns say, that no answer is lost or doubled, and how much memory it takes."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
from medlit.predictions.columns import rows
from medlit.predictions.resume_key import Origin
from medlit.predictions.shards import PartFile, answered, find_parts, part_path, read_part
from medlit.predictions.write import FORMATS, write_table

if TYPE_CHECKING:
    from conftest import Medlit, Outcome

SOURCE = Path(package.__file__).parents[1]
LABELS = LabelSet.from_names(list(SPECIALTIES))
ORIGIN = Origin(notes=6, notes_hash="a", weights_hash="b", settings={"model.decoding.mode": "likelihood"})
Predict = Callable[..., "Outcome"]


# --- columns ----------------------------------------------------------------------------------------------------------


def told(probabilities: list[list[float]] | None, labels: list[int], abstain_below: float | None) -> list[dict]:
    size = len(labels)
    prompts = Prompts(torch.zeros(size, 1), torch.ones(size, 1), list(range(size)), ["n"] * size, [0] * size)
    given = None if probabilities is None else torch.tensor(probabilities)
    return rows(prompts, Answers(torch.tensor(labels), ["?"] * size, given), LABELS, abstain_below)


def test_an_answer_comes_with_its_probability_its_margin_and_the_runner_up() -> None:
    found = told([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.4, 0.5, 0.1]], [0, 0, 0], None)
    wanted = [(0.6, 0.3, LABELS.names[1]), (0.5, 0.2, LABELS.names[2]), (0.4, -0.1, LABELS.names[1])]
    assert [(row["probability"], row["margin"], row["runner_up"]) for row in found] == wanted
    assert [row["specialty"] for row in found] == [LABELS.names[0]] * 3
    assert not any(row["abstained"] for row in found)


def test_a_doubtful_answer_is_not_filed_and_stays_to_be_seen() -> None:
    sure, just, doubtful = told([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.499, 0.3, 0.201]], [0, 0, 0], 0.5)
    assert [row["abstained"] for row in (sure, just, doubtful)] == [False, False, True]
    assert [row["specialty"] for row in (sure, just, doubtful)] == [LABELS.names[0], LABELS.names[0], None]
    assert doubtful["answer"] == "?"
    assert (doubtful["probability"], doubtful["runner_up"]) == (0.499, LABELS.names[1])


@pytest.mark.parametrize("probabilities", [None, [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]])
def test_what_is_off_the_list_or_not_weighed_has_no_probability(probabilities: list[list[float]] | None) -> None:
    listed, invalid = told(probabilities, [0, LABELS.invalid], None)
    assert listed["specialty"] == LABELS.names[0]
    assert (listed["probability"] is None) == (probabilities is None)
    nothing = [invalid[name] for name in ("specialty", "probability", "margin", "runner_up")]
    assert nothing == [None] * 4
    assert invalid["abstained"] is False


# --- parts ------------------------------------------------------------------------------------------------------------


def row(place: int, **cells: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a cell holds
    empty = {"specialty": None, "probability": None, "margin": None, "runner_up": None}
    return {"row": place, "id": f"n{place}", "answer": "x", "abstained": False, "cut_tokens": 0} | empty | cells


def write_part(table: Path, rank: int, *places: int, keep: int = 0) -> Path:
    part = PartFile(part_path(table, rank), ORIGIN, keep)
    part.add([row(place, answer=f"of {rank}\n\u2028ä") for place in places])
    part.close()
    return part.path


def test_a_part_cut_off_at_any_byte_keeps_the_lines_before(tmp_path: Path) -> None:
    path = write_part(tmp_path / "out.csv", 0, 5, 3)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        part = read_part(path)
        kept = [end for end in ends if end <= cut]
        assert part.end == (kept[-1] if kept else 0)
        assert part.rows.tolist() == [5, 3][: max(0, len(kept) - 1)]
        assert (part.origin is None) == (not kept)
        again = read_part(write_part(tmp_path / "out.csv", 0, 1, keep=part.end))
        assert again.rows.tolist() == [*part.rows, 1], "what is added stands on a line of its own"


def test_what_stands_behind_damage_is_dropped(tmp_path: Path) -> None:
    path = write_part(tmp_path / "out.csv", 0, 5, 3, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"\0" * 20 + b"\n", b"\xff\xfe\n", b"[1]\n", b"{}\n", b"\n"):
        path.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        assert read_part(path).rows.tolist() == [5]


def test_a_part_is_its_owner_s_alone_and_nobody_else_s_file(tmp_path: Path) -> None:
    write_part(tmp_path / "out.csv", 0)
    write_part(tmp_path / "out.csv", 12)
    for name in (".out.csv.part", ".out.csv.part1x", ".outXcsv.part1", ".other.csv.part0", "out.csv.part0"):
        (tmp_path / name).touch()
    found = find_parts(tmp_path / "out.csv")
    assert [path.name for path in found] == [".out.csv.part0", ".out.csv.part12"]
    assert {path.stat().st_mode & 0o777 for path in found} == {0o600}


# --- the table --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, whatever its format."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


@pytest.mark.parametrize("suffix", FORMATS)
def test_parts_of_any_processes_become_one_table_in_the_order_of_the_source(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"out{suffix}"
    parts = [write_part(table, 0, 4, 0), write_part(table, 3, 5, 2, 4), write_part(table, 11)]
    found = [read_part(path) for path in parts]
    assert answered(found, 6).tolist() == [True, False, True, False, True, True]
    write_table(found, 6, table)
    assert [line["id"] for line in read(table)] == ["n0", "n2", "n4", "n5"]
    assert [line["answer"][3] for line in read(table)] == ["0", "3", "3", "3"]
    assert read(table)[0]["answer"] == "of 0\n\u2028ä"


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")', " =1"])
def test_a_text_that_a_spreadsheet_would_run_is_disarmed_in_csv_alone(tmp_path: Path, cell: str) -> None:
    for suffix in FORMATS:
        table = tmp_path / f"out{suffix}"
        part = PartFile(part_path(table, 0), ORIGIN, 0)
        part.add([row(0, id=cell, answer=cell, runner_up=cell, margin=-0.25)])
        part.close()
        write_table([read_part(part.path)], 1, table)
        (found,) = read(table)
        shown = f"'{cell}" if suffix == ".csv" and cell != " =1" else cell
        assert [found[name] for name in ("id", "answer", "runner_up")] == [shown] * 3
        assert float(found["margin"]) == -0.25, "a number is no text"


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_grows_by_where_an_answer_stands_and_not_by_what_it_says(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for size in (12_000, 24_000):
        table = tmp_path / f"{size}{suffix}"
        places = np.random.default_rng(0).permutation(size).tolist()
        for rank in range(2):
            part = PartFile(part_path(table, rank), ORIGIN, 0)
            part.add([row(place, answer=HEART * 4, specialty=HEART) for place in places[rank::2]])
            part.close()
        tracemalloc.start()
        try:
            write_table([read_part(path) for path in find_parts(table)], size, table)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(read(table)) == size
    assert (peaks[1] - peaks[0]) / 12_000 < 100, "bytes a note; as an object it takes 1000"


# --- a run that is interrupted ----------------------------------------------------------------------------------------


@pytest.fixture
def predict(medlit: Medlit, run: Path, tiny_config: Path) -> Predict:
    """File the eight test notes, one a batch, into out.csv."""
    weighed = ["--model.decoding.mode", "likelihood", "--data.batching.eval_batch_size", "1", "--output", "out.csv"]
    return lambda *arguments: medlit("predict", "--config", tiny_config, "--ckpt_path", "best", *weighed, *arguments)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that the model is asked about, as they come."""
    step, found = SpecialtyClassifier.predict_step, []

    def counting(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        found.extend(batch.ids)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SpecialtyClassifier, "predict_step", counting)
    return found


def killed(predict: Predict, target: str, calls: int) -> Path:
    """Let a process be killed behind so many calls of a function; give the part that it leaves."""
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
    (part,) = find_parts(Path("out.csv"))
    return part


ADD = "medlit.predictions.shards.PartFile.add"  # first the origin, then batch by batch
JOIN = "medlit.callbacks.predictions.write_table"


@pytest.fixture
def whole(predict: Predict) -> bytes:
    """The table that a run leaves which nobody interrupts."""
    assert predict().code == 0
    table = Path("out.csv").read_bytes()
    Path("out.csv").unlink()
    return table


@pytest.mark.parametrize(
    ("target", "calls", "torn", "kept"), [(ADD, 1, 0, 0), (ADD, 4, 0, 3), (ADD, 6, 7, 4), (JOIN, 0, 0, 8)]
)
def test_a_killed_run_goes_on_and_neither_repeats_nor_loses_a_note(
    predict: Predict, whole: bytes, asked: list[str], target: str, calls: int, torn: int, kept: int
) -> None:
    part = killed(predict, target, calls)
    assert not Path("out.csv").exists()
    os.truncate(part, part.stat().st_size - torn)
    before = [
        json.loads(line)["id"] for line in part.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")
    ]
    outcome = predict("--resume")
    assert outcome.code == 0
    assert f"{kept} of 8 notes were answered before" in outcome.err
    assert outcome.err.rstrip().endswith("medlit: written: out.csv")
    assert Path("out.csv").read_bytes() == whole
    everyone = {note["id"] for note in notes()["test"]}
    assert len(before) == kept
    if kept < 8:
        assert set(asked) == everyone - set(before)
        assert len(asked) == 8 - kept
    assert not list(Path().glob(".out*"))


def test_without_resume_what_was_left_is_thrown_away(predict: Predict, whole: bytes, asked: list[str]) -> None:
    left = killed(predict, ADD, 3)
    shutil.copy(left, part_path(Path("out.csv"), 5))
    assert predict().code == 0
    assert len(asked) == 8
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


def test_resume_where_nothing_was_interrupted_begins_anew(predict: Predict, whole: bytes, asked: list[str]) -> None:
    outcome = predict("--resume")
    assert "no interrupted run lies beside out.csv; beginning with the first note" in outcome.err
    assert len(asked) == 8
    assert Path("out.csv").read_bytes() == whole


def test_what_another_number_of_processes_left_counts(predict: Predict, whole: bytes, asked: list[str]) -> None:
    origin, *lines = killed(predict, ADD, 6).read_bytes().splitlines(keepends=True)
    for rank, theirs in ((0, lines[:1]), (1, [*lines[1:3], lines[3][:-9]]), (4, lines[4:])):
        part_path(Path("out.csv"), rank).write_bytes(b"".join([origin, *theirs]))
    part_path(Path("out.csv"), 7).write_bytes(origin[:20])
    assert predict("--resume").code == 0
    assert len(asked) == 8 - 4
    assert Path("out.csv").read_bytes() == whole
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.decoding.mode", "constrained"], 'model.decoding.mode was "likelihood" and is "constrained"'),
        (["--model.decoding.abstain_below", "0.5"], "model.decoding.abstain_below was null and is 0.5"),
        (["--data.predict.source", "validation"], "the notes are others"),
        (["--ckpt_path", "other.ckpt"], "the weights or their temperature are others"),
    ],
)
def test_an_interrupted_run_that_asked_otherwise_is_not_gone_on_with(
    predict: Predict, run: Path, arguments: list[str], told: str
) -> None:
    part = killed(predict, ADD, 3)
    left = part.read_bytes()
    if "other.ckpt" in arguments:
        checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        torch.save(checkpoint | {"global_step": 99}, "other.ckpt")
    outcome = predict("--resume", *arguments)
    assert outcome.code == 2
    said = outcome.err.strip().splitlines()[-1]
    assert said.startswith("medlit: resume: the run that was interrupted beside out.csv asked otherwise (")
    assert told in said
    assert part.read_bytes() == left
    assert not Path("out.csv").exists()


def test_the_batch_size_may_change_on_the_way(predict: Predict, whole: bytes, asked: list[str]) -> None:
    killed(predict, ADD, 3)
    assert predict("--resume", "--data.batching.eval_batch_size", "4").code == 0
    assert len(asked) == 6
    assert [row["answer"] for row in read(Path("out.csv"))] == [
        row["answer"] for row in csv.DictReader(io.StringIO(whole.decode()))
    ]


@pytest.mark.parametrize("stopped", ["SIGTERM", "an error"])
def test_a_run_that_stops_says_how_to_go_on(
    predict: Predict, whole: bytes, asked: list[str], monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    step = SpecialtyClassifier.predict_step

    def stopping(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        if batch_idx == 2 and stopped == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif batch_idx == 2:
            raise UserError("the disk is full")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SpecialtyClassifier, "predict_step", stopping)
        outcome = predict()
    assert outcome.code == (128 + signal.SIGTERM if stopped == "SIGTERM" else 2)
    assert "what was answered so far is kept; the same command with --resume goes on" in outcome.err
    assert not Path("out.csv").exists()
    before = len(asked)
    assert predict("--resume").code == 0
    assert len(asked) == 8 == before + 8 - (3 if stopped == "SIGTERM" else 2)
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


def test_a_run_in_a_folder_of_its_own_is_kept_and_found_again(
    medlit: Medlit, run: Path, tiny_config: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SpecialtyClassifier.predict_step

    def failing(self: SpecialtyClassifier, batch: Prompts, batch_idx: int) -> Answers:
        if batch_idx == 1:
            raise UserError("the GPU is full")
        return step(self, batch, batch_idx)

    adapted = ["predict", "--config", tiny_config, "--model.adapter", run / "adapter"]
    with monkeypatch.context() as patch:
        patch.setattr(SpecialtyClassifier, "predict_step", failing)
        assert medlit(*adapted).code == 2
    assert medlit(*adapted, "--resume").code == 0
    found = read(run.with_name("version_1") / "predictions.csv")
    assert [row["id"] for row in found] == [note["id"] for note in notes()["test"]]
    assert len(asked) == 8
    assert not run.with_name("version_2").exists()


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_left(predict: Predict, whole: bytes, tiny_config: Path) -> None:
    killed(predict, ADD, 4)
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


# --- one note, and doubt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constrained", "likelihood"])
def test_one_note_prints_the_answer_and_beside_it_how_sure_it_is(
    medlit: Medlit, run: Path, tiny_config: Path, mode: str
) -> None:
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--model.decoding.mode", mode]
    arguments += ["--model.decoding.abstain_below", "1", "--data.predict.text", "Patient 30 years old: heart pain."]
    outcome = medlit("predict", *arguments)
    assert outcome.out.removesuffix("\n") in SPECIALTIES
    told = re.search(
        r"medlit: probability 0\.\d{3}, margin -?0\.\d{3}, runner-up (.+); model\.decoding\.abstain_below would",
        outcome.err,
    )
    assert told is not None
    assert told[1] in SPECIALTIES


def test_the_doubtful_are_abstained_from(predict: Predict) -> None:
    assert predict("--model.decoding.abstain_below", "1").code == 0
    found = read(Path("out.csv"))
    assert {(row["specialty"], row["abstained"]) for row in found} == {("", "True")}
    assert {row["answer"] for row in found} <= set(SPECIALTIES)
    assert all(0 < float(row["probability"]) < 1 and row["runner_up"] != row["answer"] for row in found)


def test_answers_that_are_written_down_are_not_kept_in_memory(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning gathers what predict gives back, for a million notes as for eight."""
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
