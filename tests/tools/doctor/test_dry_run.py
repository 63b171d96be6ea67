"""`medlit doctor --config`: the fit itself is tried, all that would end it is a row, and no file stays."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from fake_tokenizers import byte_tokenizer
from jsonargparse import Namespace

from medlit.cli.cli import MedlitCLI
from medlit.data.prompt import AlpacaPrompt
from medlit.errors import UserError, WrongNumbersError
from medlit.model import loading
from medlit.model.fit_memory import FitMemory
from medlit.model.memory import GIB
from medlit.tools import doctor
from medlit.tools.doctor import CheckResult, dry_run, probe, verdict
from medlit.tools.doctor.dry_run import DryRunCLI, check_labels, memory_result

# --- labels and tokens ------------------------------------------------------------------------------------------------


class AsciiPrompt(AlpacaPrompt):
    """A prompt whose tokenizer loses accents."""

    def response(self, specialty: str) -> list[int]:
        return super().response(specialty.encode("ascii", "ignore").decode())


def test_labels_of_the_same_tokens_fail() -> None:
    row = check_labels(AsciiPrompt(byte_tokenizer()), ["Neurologie", "Néurologie", "Nurologie", "Onkologie"])
    assert row.status == "fail"
    assert "'Nurologie' and 'Néurologie'" in row.found
    assert "Onkologie" not in row.found
    assert row.remedy


def test_labels_may_share_their_first_token() -> None:
    row = check_labels(AlpacaPrompt(byte_tokenizer()), ["Neurology", "Neurosurgery", "Orthopedic"])
    assert (row.status, row.remedy) == ("ok", "")
    assert row.found.startswith("3 of 10 to 13 tokens with EOS, 2 different first tokens")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(80, "ok"), (33.5, "warn"), (24, "fail")])
def test_what_does_not_fit_fails_and_what_is_close_warns(free: int, status: str) -> None:
    needed = FitMemory(int(5.4 * GIB), GIB // 2, 25 * GIB, GIB, layers=32, layers_kept=32)
    row = memory_result(needed, int(free * GIB), "the GPU", 7_424)
    assert row.status == status
    assert "7,424 tokens" in row.found
    assert ("gradient_checkpointing" in row.remedy) == (status != "ok")


def test_the_cure_names_the_larger_batch() -> None:
    needed = FitMemory(weights=0, adapter=0, training=1, evaluation=2, layers=32, layers_kept=32)
    assert memory_result(needed, 1, "the GPU", 1).remedy.startswith("set data.batching.eval_batch_size")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([CheckResult("torch", "ok", "")], "medlit can run here."),
        ([CheckResult("GPU", "warn", "")], "medlit can run here, on the CPU (small models only)."),
        ([CheckResult("torch", "fail", ""), CheckResult("config", "ok", "")], "medlit cannot run here: torch."),
        ([CheckResult("GPU", "warn", ""), CheckResult("config", "ok", "")], "This fit can run here."),
        (
            [CheckResult("config", "ok", ""), CheckResult("base model", "warn", "")],
            "medlit can run here; not all of the config was tried: base model.",
        ),
        (
            [CheckResult("GPU", "warn", ""), CheckResult("config", "ok", ""), CheckResult("notes", "warn", "")],
            "medlit can run here, on the CPU (small models only); not all of the config was tried: notes.",
        ),
    ],
)
def test_the_verdict_is_only_about_what_was_tried(rows: list[CheckResult], words: str) -> None:
    assert verdict(rows) == words


@pytest.mark.parametrize(
    ("devices", "processes"), [("auto", 4), (-1, 4), (2, 2), ("2", 2), ("0,3", 2), ([1, 2, 3], 3), (1, 1)]
)
def test_a_fit_has_as_many_processes_as_devices(
    monkeypatch: pytest.MonkeyPatch, devices: str | int | list[int], processes: int
) -> None:
    """The dry run itself has one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(MedlitCLI, "before_instantiate_classes", lambda _: None)
    cli = object.__new__(DryRunCLI)
    trainer = Namespace(accelerator="gpu", devices=devices)
    cli.config = Namespace(fit=Namespace(trainer=trainer))
    cli.before_instantiate_classes()
    assert cli.processes == processes
    assert trainer.devices in (1, [1])


# --- the whole dry run ------------------------------------------------------------------------------------------------


class DryRun:
    """The results of a dry run."""

    def __init__(self, results: Iterator[CheckResult]) -> None:
        self.rows = {result.check: result for result in results}

    @property
    def statuses(self) -> dict[str, str]:
        return {check: row.status for check, row in self.rows.items()}

    @property
    def example(self) -> str:
        """The example's text, marked."""
        return self.rows["example"].found.partition(": ")[2]


@pytest.fixture
def tried(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """Try the tiny fit with other flags, in an empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*flags: object, show_notes: bool = False) -> DryRun:
        return DryRun(dry_run.dry_run(["--config", str(tiny_config), *map(str, flags)], show_notes))

    return run


def test_a_fit_is_tried_and_leaves_no_files(tried: Any, tmp_path: Path) -> None:  # noqa: ANN401
    found = tried("--data.batching.token_budget", 4 * 128)
    assert found.statuses == dict.fromkeys(
        [
            "config",
            "notes",
            "labels",
            "example",
            "memory",
            "training step",
            "validation step",
            "memory, measured",
            "self-check",
        ],
        "ok",
    )
    assert found.rows["notes"].found.startswith("train 24, validation 8, test 8; the longest prompt has 104 of at most")
    # A whole optimizer step of two micro-batches, and the first validation batch.
    assert ": 8 notes, padded, " in found.rows["training step"].found
    assert "for the longest 4 notes (generate)" in found.rows["validation step"].found
    assert found.rows["self-check"].found.endswith("; labels share a prompt's computation")
    assert not list((tmp_path / "work").iterdir())


def test_a_model_whose_numbers_are_wrong_fails_the_self_check(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    def wrong(*_: object) -> None:
        raise WrongNumbersError("model.language_model.base_model: they differ by 7 nats; choose another base model.")

    monkeypatch.setattr(loading, "check_numbers", wrong)
    found = tried()
    row = found.rows["self-check"]
    assert (row.status, row.remedy) == ("fail", "choose another base model")
    assert "differ by 7 nats" in row.found
    assert "trial" not in found.rows


def test_the_example_is_invented_unless_own_notes_are_requested(tried: Any, notes_folder: Path) -> None:  # noqa: ANN401
    invented = tried("--trainer.max_steps", 1)
    supervised = re.findall(r"\[\[(.*?)\]\]", invented.example)
    assert len(supervised) == 1
    assert supervised[0].endswith("</s>")
    assert invented.example.endswith(f"### Response:\n[[{supervised[0]}]]")
    assert "Patient 3" not in invented.example
    own = tried(show_notes=True)
    assert "Patient 3" in own.example or "heart" in own.example
    others = [row for row in [*invented.rows.values(), *own.rows.values()] if row.check != "example"]
    assert "Patient 3" not in " ".join(row.found + row.remedy for row in others)


def test_without_the_prompt_mask_all_but_the_first_token_is_supervised(tried: Any) -> None:  # noqa: ANN401
    example = tried("--data.mask_prompt", "false").example
    assert example.startswith("<s>[[")
    assert example.endswith("]]")
    assert example.count("[[") == example.count("]]") == 1


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
    assert found.rows[row].remedy
    assert "training step" not in found.rows
    assert found.statuses["self-check"] == "warn"
    assert "not checked" in found.rows["self-check"].found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_notes_are_checked_without_the_gpu_of_the_config(tried: Any) -> None:  # noqa: ANN401
    found = tried("--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp")
    assert found.rows["devices"].status == "fail"
    assert "medlit doctor" not in found.rows["devices"].remedy
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


def test_an_unexpected_error_is_a_row(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    @functools.wraps(L.Trainer.fit)  # whose signature LightningCLI reads
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no\nmore")

    monkeypatch.setattr(L.Trainer, "fit", broken)
    row = tried().rows["trial"]
    assert (row.status, row.found) == ("fail", "ZeroDivisionError: no")


@pytest.mark.parametrize("flag", ["--data.sauce=x", "--trainer.max_steps=none", "--val_every_steps=0"])
def test_an_invalid_setting_is_a_mistake(tried: Any, flag: str) -> None:  # noqa: ANN401
    with pytest.raises(UserError) as error:
        tried(flag)
    assert flag[2:].partition("=")[0] in str(error.value)
    assert "medlit:" not in str(error.value)


def test_a_mistake_in_the_settings_ends_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_probe import Child

    child = Child(json.dumps({"mistake": "data.sauce: there is no such key."}))
    with pytest.raises(UserError, match=r"data\.sauce"):
        doctor.read_probe(child, has_config=True)


def test_the_probe_gets_the_settings_without_the_flags_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert commands[1][3:] == ["--config", "a.yaml", "--show_notes", "--data.predict.text=x", "--config", "b"]


def test_the_probe_prints_the_dry_run_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(settings: list[str], show_notes: bool) -> Iterator[CheckResult]:
        yield CheckResult("notes", "ok", f"{settings} {show_notes}")
        raise UserError("trainer: no.")

    monkeypatch.setattr(dry_run, "dry_run", results)
    monkeypatch.setattr(probe, "LIBRARY_CHECKS", {})
    probe.main(["--show_notes", "--config", "a"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"check": "notes", "status": "ok", "found": "['--config', 'a'] True", "remedy": ""},
        {"mistake": "trainer: no."},
    ]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_example_is_printed_as_it_is(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fake_probe import Child, lines

    child = Child(lines(CheckResult("example", "ok", "a note: [red]Response: [[Neurology]]")))
    monkeypatch.setattr(doctor, "start_probe", lambda arguments: child)
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
