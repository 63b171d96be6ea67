"""`medlit doctor --config`: a fit is tried on its own road, everything that would end it is a row, nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fake_tokenizers import EOS, byte_tokenizer
from test_memory import LLAMA_8B, LOADED, TRAINED
from transformers import LlamaConfig

from medlit.data.collate import Batch
from medlit.data.prompt import AlpacaPrompt
from medlit.errors import UserError
from medlit.model.memory import GIB, SLACK
from medlit.model.settings import LanguageModel, Lora
from medlit.tools import doctor
from medlit.tools.doctor import dry_run, memory_fit, probe
from medlit.tools.doctor.check_result import Row
from medlit.tools.doctor.dry_run import rehearse
from medlit.tools.doctor.memory_fit import memory_row, need
from medlit.tools.doctor.show import Example, marked, verdict
from medlit.tools.doctor.tokens import label_row, supervision_row

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# --- labels and tokens ------------------------------------------------------------------------------------------------


class Spelled(AlpacaPrompt):
    """A prompt whose tokenizer lacks everything but letters: an accent is lost."""

    def response(self, specialty: str) -> list[int]:
        return super().response(specialty.encode("ascii", "ignore").decode())


def test_labels_that_are_the_same_tokens_fail() -> None:
    row = label_row(Spelled(byte_tokenizer()), ["Neurologie", "Néurologie", "Nurologie", "Onkologie"])
    assert row.status == "fail"
    assert "'Nurologie' and 'Néurologie'" in row.found
    assert "Onkologie" not in row.found
    assert row.cure


def test_a_label_that_begins_another_is_a_warning() -> None:
    row = label_row(AlpacaPrompt(byte_tokenizer()), ["Neurology", "Neuro", "Orthopedic"])
    assert (row.status, "'Neuro' and 'Neurology'" in row.found) == ("warn", True)


def test_labels_that_share_a_first_token_are_well() -> None:
    row = label_row(AlpacaPrompt(byte_tokenizer()), ["Neurology", "Neurosurgery", "Orthopedic"])
    assert (row.status, row.cure) == ("ok", "")
    assert row.found.startswith("3 of 10 to 13 tokens with the end, 2 different first tokens")


def batch(supervised: int) -> Batch:
    places = torch.arange(supervised)
    return Batch(torch.zeros(1, 8, dtype=torch.long), places, places, [8], supervised, ["a"])


def test_a_batch_without_supervised_tokens_fails() -> None:
    assert supervision_row([batch(2), batch(6)], whole=True) == Row(
        "supervised tokens", "ok", "2 to 6 in each of 2 micro-batches of an epoch, 50.0% of all tokens"
    )
    row = supervision_row([batch(2), batch(0)], whole=False)
    assert (row.status, row.found) == ("fail", "none in 1 of the first 2 micro-batches")


# --- memory -----------------------------------------------------------------------------------------------------------


def llama_8b(tokens: int = 7_424, checkpointing: Any = "off", device: torch.device = GPU) -> Any:  # noqa: ANN401
    language_model = LanguageModel(gradient_checkpointing=checkpointing)
    return need(LlamaConfig(**LLAMA_8B), language_model, Lora(), tokens, 4_096, device, torch.bfloat16)


def test_weights_and_adapter_are_what_was_measured() -> None:
    takes = llama_8b()
    assert takes.adapter == 10 * TRAINED
    assert takes.weights + 4 * TRAINED == pytest.approx(LOADED, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "measured"), [(7_424, "off", 31.32), (3_843, "off", 19.09), (7_424, "unsloth", 9.34)]
)
def test_training_is_what_was_measured_on_an_h100(tokens: int, checkpointing: str, measured: float) -> None:
    takes = llama_8b(tokens, checkpointing)
    assert (takes.weights + takes.adapter + takes.training) / GIB == pytest.approx(measured, rel=0.04)


def test_the_quickstart_is_estimated_near_what_it_took() -> None:
    """Two steps of configs/quickstart.yaml on two cores: ru_maxrss 2.6 GiB, 24 November 2026."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    language_model = LanguageModel(gradient_checkpointing="off")
    takes = need(config, language_model, Lora(), 692, 39 * 178, CPU, torch.float32)
    assert takes.total / GIB == pytest.approx(2.6, rel=0.2)


@pytest.mark.parametrize(("free", "status"), [(80, "ok"), (33.5, "warn"), (24, "fail")])
def test_what_does_not_fit_fails_and_what_is_close_warns(free: int, status: str) -> None:
    row = memory_row(llama_8b(), int(free * GIB), "the GPU", 7_424)
    assert row.status == status
    assert "7,424 tokens" in row.found
    assert ("gradient_checkpointing" in row.cure) == (status != "ok")


def test_under_auto_as_many_layers_are_kept_as_the_fit_will_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on an H100 within 24 GiB: 22.5 GiB; with none kept, 9.3."""
    budgets = {80: (32, 32), 24: (12, 24), 8: (1, 1)}
    for gib, (least, most) in budgets.items():
        monkeypatch.setattr(memory_fit, "budget_on", lambda device, limit, gib=gib: int(SLACK * gib * GIB))
        takes = llama_8b(checkpointing="auto")
        assert least <= takes.kept <= most
        if gib == 24:
            assert (takes.weights + takes.adapter + takes.training) / GIB == pytest.approx(22.5, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Row("torch", "ok", "")], "medlit can run here."),
        ([Row("torch", "fail", ""), Row("config", "ok", "")], "medlit cannot run here: torch."),
        ([Row("GPU", "warn", ""), Row("config", "ok", "")], "This fit can run here."),
        (
            [Row("config", "ok", ""), Row("base model", "warn", "")],
            "medlit can run here; not all of the config was tried: base model.",
        ),
    ],
)
def test_the_verdict_says_no_more_than_was_tried(rows: list[Row], words: str) -> None:
    assert verdict(rows) == words


# --- the whole road ---------------------------------------------------------------------------------------------------


class Tried:
    """What a trial told."""

    def __init__(self, findings: Iterator[Row | Example]) -> None:
        self.rows: dict[str, Row] = {}
        self.example: Example = []
        for finding in findings:
            if isinstance(finding, Row):
                self.rows[finding.check] = finding
            else:
                self.example = finding

    @property
    def statuses(self) -> dict[str, str]:
        return {check: row.status for check, row in self.rows.items()}


@pytest.fixture
def tried(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """Try the tiny fit with other flags, in an empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*flags: object, show_notes: bool = False) -> Tried:
        return Tried(rehearse(["--config", str(tiny_config), *map(str, flags)], show_notes))

    return run


def test_a_fit_is_tried_and_leaves_nothing(tried: Any, tmp_path: Path) -> None:  # noqa: ANN401
    found = tried()
    assert found.statuses == dict.fromkeys(
        [
            "config",
            "notes",
            "labels",
            "example",
            "supervised tokens",
            "memory",
            "training step",
            "validation step",
            "memory, measured",
        ],
        "ok",
    )
    assert found.rows["notes"].found.startswith("train 24, validation 8, test 8; the longest prompt has 104 of at most")
    # A whole optimizer step of two micro-batches, and the first validation batch.
    assert ": 8 notes, " in found.rows["training step"].found
    assert "for the longest 4 notes (generate)" in found.rows["validation step"].found
    assert not list((tmp_path / "work").iterdir())


def test_the_example_is_invented_unless_the_user_wants_his_own(tried: Any, notes_folder: Path) -> None:  # noqa: ANN401
    invented = tried("--trainer.max_steps", 1)
    taught = [text for text, supervised in invented.example if supervised]
    assert len(taught) == 1
    assert taught[0].endswith("</s>")
    assert marked(invented.example).endswith(f"### Response:\n[[{taught[0]}]]")
    assert "Patient 3" not in marked(invented.example)
    own = tried(show_notes=True)
    assert "Patient 3" in marked(own.example) or "heart" in marked(own.example)
    words = " ".join(row.found + row.cure for row in [*invented.rows.values(), *own.rows.values()])
    assert "Patient 3" not in words


def test_with_the_loss_over_the_whole_sequence_all_but_the_first_token_is_taught(tried: Any) -> None:  # noqa: ANN401
    found = tried("--data.mask_prompt", "whole")
    assert [supervised for _, supervised in found.example] == [False, True]
    assert found.example[0] == ("<s>", False)


@pytest.mark.parametrize(
    ("flags", "row", "status", "words"),
    [
        (
            ["--model.language_model.base_model", "nobody/nothing"],
            "base model",
            "warn",
            "nobody/nothing is not in this machine's cache",
        ),
        (["--data.source", "nobody/nothing"], "notes", "warn", "nobody/nothing is not in this machine's cache"),
        (["--data.source", "./nowhere.csv"], "notes", "fail", "there is no file or folder"),
        (["--data.max_response_tokens", "2"], "notes", "fail", "data.max_response_tokens"),
        (["--model.lora.target_modules", "[q_projj]"], "trial", "fail", "'q_projj'"),
    ],
)
def test_what_would_end_a_fit_is_a_row_with_a_cure(
    tried: Any,  # noqa: ANN401
    flags: list[str],
    row: str,
    status: str,
    words: str,
) -> None:
    found = tried(*flags)
    assert found.rows[row].status == status, found.rows
    assert words in found.rows[row].found
    assert found.rows[row].cure
    assert "training step" not in found.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_without_the_gpu_that_a_config_wants_the_notes_are_looked_at_all_the_same(tried: Any) -> None:  # noqa: ANN401
    found = tried("--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp")
    assert found.rows["devices"].status == "fail"
    assert "medlit doctor" not in found.rows["devices"].cure
    assert (found.statuses["labels"], found.statuses["memory"]) == ("ok", "ok")
    assert found.statuses["trial"] == "warn"
    assert "training step" not in found.rows


def test_what_does_not_fit_is_not_tried(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    little = SimpleNamespace(available=0)
    monkeypatch.setattr(dry_run.psutil, "virtual_memory", lambda: little)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(dry_run.psutil, "Process", lambda: process)
    found = tried()
    assert (found.statuses["memory"], found.statuses["trial"]) == ("fail", "warn")


def test_an_unforeseen_end_is_a_row(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    def broken(self: dry_run.Trial) -> None:
        raise ZeroDivisionError("no\nmore")

    monkeypatch.setattr(dry_run.Trial, "go", broken)
    row = tried().rows["trial"]
    assert (row.status, row.found) == ("fail", "ZeroDivisionError: no")


@pytest.mark.parametrize("flag", ["--data.sauce=x", "--trainer.max_steps=none", "--val_every_steps=0"])
def test_a_setting_that_is_none_is_a_mistake(tried: Any, flag: str) -> None:  # noqa: ANN401
    with pytest.raises(UserError) as told:
        tried(flag)
    assert flag[2:].partition("=")[0] in str(told.value)
    assert "medlit:" not in str(told.value)


def test_a_mistake_in_the_settings_ends_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_doctor import Child

    child = Child(json.dumps({"mistake": "data.sauce: there is no such key."}))
    with pytest.raises(UserError, match=r"data\.sauce"):
        doctor.gather(child, patient=True)


def test_settings_go_to_the_trial_and_flags_of_the_doctor_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def child(command: list[str], **_: object) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", child)
    for arguments in (
        ["--json"],
        ["--config", "a.yaml", "--json", "--show_notes", "--data.predict.text=x", "--config", "b"],
    ):
        with pytest.raises(KeyboardInterrupt):
            doctor.run(arguments)
    assert commands[0][3:] == []
    assert commands[1][3:] == ["--show_notes", "--config", "a.yaml", "--data.predict.text=x", "--config", "b"]


def test_the_probe_hands_the_trial_on_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(settings: list[str], show_notes: bool) -> Iterator[Row | Example]:
        yield Row("notes", "ok", f"{settings} {show_notes}")
        yield [("Response:", False), (f"Neurology{EOS}", True)]
        raise UserError("trainer: no.")

    monkeypatch.setattr(dry_run, "rehearse", found)
    for name in ("_torch", "_bitsandbytes", "_four_bit", "_optimizer", "_triton", "_unsloth"):
        monkeypatch.setattr(probe, name, dict)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    probe.main(["--show_notes", "--config", "a"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[6:] == [
        {"row": {"check": "notes", "status": "ok", "found": "['--config', 'a'] True", "cure": ""}},
        {"example": [["Response:", False], [f"Neurology{EOS}", True]]},
        {"mistake": "trainer: no."},
    ]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_example_is_shown_with_what_is_taught_between_brackets(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_doctor import Child

    facts = [{"row": {"check": "example", "status": "ok", "found": "a note", "cure": ""}}]
    facts += [{"example": [["[red]Response: ", False], ["Neurology", True]]}]
    monkeypatch.setattr(doctor, "start", lambda settings, show_notes: Child("\n".join(map(json.dumps, facts))))
    doctor.run(["--config", "a", *["--json"] * as_json])
    out = capsys.readouterr().out
    assert "[red]Response: [[Neurology]]" in out
    if as_json:
        assert [row["found"] for row in json.loads(out) if row["check"] == "example"] == [
            "a note: [red]Response: [[Neurology]]"
        ]


@pytest.mark.slow
def test_the_command_itself(tiny_config: Path, tmp_path: Path) -> None:
    path = [os.environ.get("PYTHONPATH", ""), str(Path(doctor.__file__).parents[3])]
    command = [sys.executable, "-m", "medlit", "doctor", "--json", "--config", tiny_config]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=250,
    )
    rows = {row["check"]: row["status"] for row in json.loads(done.stdout)}
    assert done.returncode == 0, rows
    assert rows["training step"] == rows["validation step"] == "ok"
    assert not list(tmp_path.iterdir())
    assert yaml.safe_load(tiny_config.read_text())["trainer"]["max_steps"] == 11
