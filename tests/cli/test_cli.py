"""The command line as a user sees it: settings and their precedence, run folders, four verbs on a tiny model."""

from __future__ import annotations

import csv
import errno
import gc
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import yaml
from fakes import SPECIALTIES, AtOnce, notes, write_csv, write_notes

import medlit as package
from medlit.cli import TOOLS, tool_parser
from medlit.errors import UserError
from medlit.predictions.table import Prediction, make_predictions

if TYPE_CHECKING:
    from conftest import Medlit

SOURCE = Path(package.__file__).parents[1]
COUNTED = {"accuracy", "any_of_accuracy", "balanced_accuracy", "f1_macro", "f1_weighted", "invalid_rate"}
COUNTED |= {"n", "several_labels", "per_class", "confusion", "loss"}
DOUBT = {"accuracy_ci", "any_of_accuracy_ci", "accuracy_ci_bootstrap", "f1_macro_ci"}
OF_PROBABILITIES = {"top3_accuracy", "log_loss", "brier", "ece", "temperature", "aurc"}
OF_PROBABILITIES |= {"accuracy_at_80", "accuracy_at_90"}
SCORES = COUNTED | DOUBT | OF_PROBABILITIES
COLUMNS = ("id", "specialty", "answer", "probability", "margin", "runner_up", "abstained", "cut_tokens")
HEAVY = ("torch", "lightning", "transformers", "unsloth", "datasets", "pandas", "numpy", "matplotlib")


IN_PROCESS = """
import sys
from medlit.__main__ import main

try:
    main(sys.argv[2:])
except SystemExit as stop:
    assert not stop.code, stop.code
exec(sys.argv[1])
"""


def command(*arguments: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `medlit` in a new process, then a line of code in it."""
    return python("-c", IN_PROCESS, code, *arguments, cwd=cwd)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )


def settings(run_medlit: Medlit, *arguments: object) -> dict[str, dict]:
    """What `--print_config` shows."""
    outcome = run_medlit(*arguments, "--print_config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def scores(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in TensorBoard's files."""
    return read_curves(run, tuple(sorted((path.name, path.stat().st_size) for path in run.glob("events*"))))[tag]


@cache
def read_curves(run: Path, files: tuple[tuple[str, int], ...]) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run whose files have these sizes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- before any model -------------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path, code=f"print([name for name in {HEAVY!r} if name in sys.modules])")
    assert all(f"  {verb} " in done.stdout for verb in ("fit", "validate", "test", "predict", "doctor", "audit"))
    assert done.stdout.splitlines()[-1] == "[]"
    assert files(tmp_path) == set()


@pytest.mark.parametrize("tool", TOOLS)
def test_the_help_of_a_tool_imports_nothing_heavy(tmp_path: Path, tool: str) -> None:
    done = command(tool, "--help", cwd=tmp_path, code=f"print([name for name in {HEAVY!r} if name in sys.modules])")
    assert f"medlit {tool}" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_limit_of_one_batch_is_a_number_and_not_the_share_of_all(run_medlit: Medlit) -> None:
    limits = [
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1.0",
        "--trainer.limit_predict_batches=0.25",
    ]
    trainer = yaml.safe_load(run_medlit("fit", *limits, "--print_config").out)["trainer"]
    assert [repr(trainer[f"limit_{stage}_batches"]) for stage in ("val", "test", "predict")] == ["1", "1.0", "0.25"]


def test_print_config_loads_no_weights_and_not_unsloth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That no module imports Unsloth by itself is tested beside the predictor, in a process of its own."""
    from medlit.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medlit.unsloth_first.import_unsloth", lambda: pytest.fail("Unsloth was imported"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.language_model.base_model", "./nowhere", "--print_config"])
    assert not stop.value.code
    assert yaml.safe_load(capsys.readouterr().out)["model"]["language_model"]["base_model"] == "./nowhere"
    assert files(tmp_path) == set()


@pytest.mark.parametrize("arguments", [[], ["train"], ["--config", "a.yaml"]])
def test_an_unknown_verb_exits_2(arguments: list[str]) -> None:
    from medlit.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(("word", "meant"), [("train", "fit"), ("valdate", "validate"), ("evaluate", "test")])
def test_an_unknown_command_names_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], word: str, meant: str
) -> None:
    from medlit.__main__ import main

    with pytest.raises(SystemExit):
        main([word])
    assert f"there is no command '{word}'; did you mean {meant}?" in capsys.readouterr().err


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "config", "flag", "r"),
    [
        (False, False, False, 16),
        (True, False, False, 4),
        (True, True, False, 8),
        (False, True, False, 8),
        (True, True, True, 2),
        (True, False, True, 2),
    ],
)
def test_default_then_environment_then_config_then_flag(
    run_medlit: Medlit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: bool,
    config: bool,
    flag: bool,
    r: int,
) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("model: {lora: {r: 8}}")
    if environment:
        monkeypatch.setenv("MEDLIT_FIT__MODEL__LORA__R", "4")
    arguments = [*(["--config", path] if config else []), *(["--model.lora.r", "2"] if flag else [])]
    assert settings(run_medlit, "fit", *arguments)["model"]["lora"]["r"] == r


def test_a_later_config_wins_and_leaves_the_rest(run_medlit: Medlit, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {lora: {r: 8, alpha: 32}}")
    second.write_text("model: {lora: {r: 4}}")
    lora = settings(run_medlit, "fit", "--config", first, "--config", second)["model"]["lora"]
    assert (lora["r"], lora["alpha"]) == (4, 32)


def test_a_variable_of_one_verb_does_not_affect_another(run_medlit: Medlit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLIT_FIT__MODEL__LORA__R", "4")
    assert settings(run_medlit, "test")["model"]["lora"]["r"] == 16


@pytest.mark.parametrize(
    "flag", ["--model.lora.rank=4", "--data.sourse=builtin", "--trainer.steps=1", "--output=a.csv"]
)
def test_an_unknown_flag_exits_2(run_medlit: Medlit, flag: str) -> None:
    outcome = run_medlit("fit", flag)
    assert outcome.code == 2
    assert flag.removeprefix("--").partition("=")[0].split(".")[-1] in outcome.err


def test_an_unknown_key_in_a_config_exits_2(run_medlit: Medlit, tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("model: {lora: {rank: 4}}")
    outcome = run_medlit("fit", "--config", path)
    assert outcome.code == 2
    assert "rank" in outcome.err


@pytest.mark.parametrize(
    "name", ["MEDLIT_FIT__MODEL__LORA__RANK", "MEDLIT_TRAIN__MODEL__LORA__R", "MEDLIT_LORA_R", "MEDLIT_SERVE_TOKN"]
)
def test_an_unknown_name_in_the_environment_exits_2(
    run_medlit: Medlit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "4")
    for more in ([], ["--print_config"]):
        outcome = run_medlit("fit", *more)
        assert outcome.code == 2
        assert outcome.err.startswith(f"medlit: {name}: there is no such setting")
        assert outcome.out == ""
    assert files(tmp_path) == set()


@pytest.mark.parametrize("tool", ["audit", "baseline"])
@pytest.mark.parametrize("name", ["trainer.default_root_dir", "trainer.max_steps", "data.columns"])
def test_a_tool_refuses_a_null_where_a_value_is_needed(tool: str, name: str) -> None:
    from medlit.cli.arguments import parse_settings

    with pytest.raises(UserError, match=f"^{name}: must "):
        parse_settings(tool, ["--config", f"{name}: null"])


def test_a_tool_takes_no_beginning_of_a_name() -> None:
    from medlit.cli.arguments import parse_settings

    with pytest.raises(UserError, match=r"data\.sourc: there is no such setting; did you mean data\.source\?"):
        parse_settings("audit", ["--data.sourc", "notes.csv"])
    with pytest.raises(UserError, match=r"stict: there is no such setting; did you mean strict\?"):
        parse_settings("audit", ["--stict"])
    with pytest.raises(
        UserError, match=r"unrecognized arguments: --prot 8001; did you mean --port\? See 'medlit serve"
    ):
        tool_parser("serve").parse_args(["--run_dir", "x", "--prot", "8001"])


@pytest.mark.parametrize("tool", ["audit", "baseline"])
def test_a_tool_refuses_its_unknown_variables(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    from medlit.cli.arguments import parse_settings

    monkeypatch.setenv(f"MEDLIT_{tool.upper()}__DATA__SOURCE", "x.csv")
    monkeypatch.setenv("MEDLIT_FIT__MODEL__LORA__R", "4")
    assert parse_settings(tool, []).data.source == "x.csv"
    monkeypatch.setenv(f"MEDLIT_{tool.upper()}__DATA__SORCE", "x.csv")
    with pytest.raises(UserError, match=f"MEDLIT_{tool.upper()}__DATA__SORCE: there is no such setting"):
        parse_settings(tool, [])


@pytest.mark.parametrize(
    "name", ["MEDLIT_AUDIT__DATA__SOURCE", "MEDLIT_PREDICT__OUTPUT", "MEDLIT_CACHE", "MEDLIT_SERVE_TOKEN"]
)
def test_known_names_in_the_environment_pass(run_medlit: Medlit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    outcome = run_medlit("fit", "--trainer.accumulate_grad_batches", "4")  # which fails right after the check
    assert "trainer.accumulate_grad_batches" in outcome.err


@pytest.mark.parametrize("how", ["flag", "config"])
def test_accumulation_cannot_be_set(run_medlit: Medlit, tmp_path: Path, how: str) -> None:
    path = tmp_path / "accumulate.yaml"
    path.write_text("trainer: {accumulate_grad_batches: 4}")
    arguments = ["--config", path] if how == "config" else ["--trainer.accumulate_grad_batches", "4"]
    outcome = run_medlit("fit", *arguments, "--trainer.default_root_dir", tmp_path / "logs")
    assert outcome.code == 2
    assert "trainer.accumulate_grad_batches: it follows from data.batching.global_batch_size" in outcome.err
    assert files(tmp_path) == {"accumulate.yaml"}


@pytest.mark.parametrize("flag", ["--checkpoint.monitor", "--early_stopping.monitor"])
def test_an_unknown_metric_is_refused_before_the_fit(run_medlit: Medlit, flag: str) -> None:
    outcome = run_medlit("fit", flag, "val/f1")
    assert outcome.code == 2
    assert f"{flag[2:]}: 'val/f1' is not measured" in outcome.err
    assert "val/f1_macro" in outcome.err


# --- fit --------------------------------------------------------------------------------------------------------------


def test_a_fit_leaves_a_complete_run_folder(fitted: Path) -> None:
    found = files(fitted)
    events = {name for name in found if name.startswith("events.out.tfevents")}
    adapter = {name for name in found if name.startswith("adapter/")}
    assert len(events) == 1
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/medlit.json"} <= adapter
    assert {"adapter/tokenizer.json", "adapter/tokenizer_config.json"} <= adapter
    assert found - events - adapter == {
        "config_fit.yaml",
        "hparams.yaml",
        "fit_metrics.json",
        "fit_answers.parquet",
        "confusion_fit.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "split.parquet",
    }
    assert not [path for path in fitted.parent.parent.rglob("*") if path.name.startswith(".")]


def test_a_fit_s_metrics_are_complete(fitted: Path) -> None:
    found = scores(fitted / "fit_metrics.json")
    assert set(found) == SCORES
    assert set(found["per_class"]) == set(SPECIALTIES)
    assert [len(row) for row in found["confusion"]] == [4, 4, 4]
    assert sum(map(sum, found["confusion"])) == found["n"] == 8
    assert found["loss"] > 0
    assert found["accuracy_ci"][0] <= found["accuracy"] <= found["accuracy_ci"][1]
    assert {found[name] for name in OF_PROBABILITIES} == {None}  # free generation weighs no labels
    assert (fitted / "confusion_fit.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_of_answers_names_notes_and_holds_no_text(fitted: Path) -> None:
    found = pd.read_parquet(fitted / "fit_answers.parquet")
    assert list(found) == ["id", "text_hash", "truth", "answer", "tokens", "cut_tokens"]
    given = {note["id"]: note["medical_specialty"] for note in notes()["validation"]}
    assert dict(zip(found["id"], found["truth"], strict=True)) == given
    assert list(found["id"]) == list(given)
    accuracy = (found["answer"] == found["truth"]).mean()
    assert accuracy == pytest.approx(scores(fitted / "fit_metrics.json")["accuracy"])
    assert found["tokens"].between(50, 112).all()


def test_the_saved_config_trains_the_same_again(fitted: Path, tiny_config: Path, run_medlit: Medlit) -> None:
    saved = settings(run_medlit, "fit", "--config", fitted / "config_fit.yaml")
    given = settings(run_medlit, "fit", "--config", tiny_config)
    assert saved["model"] == given["model"]
    assert saved["data"] == given["data"]
    assert saved["trainer"]["max_steps"] == 11


def test_tensorboard_has_losses_scores_and_settings(fitted: Path) -> None:
    loss = curve(fitted, "train/loss")
    assert len(loss) == 11
    assert loss[-1][1] < loss[0][1] / 2
    assert [step for step, _ in curve(fitted, "val/accuracy")] == [3, 7, 10]  # after 4 and 8 steps, and the last
    assert all(math.isfinite(value) for _, value in curve(fitted, "val/loss"))
    settings = yaml.safe_load((fitted / "hparams.yaml").read_text())
    assert (settings["lora"]["r"], settings["optimizer"]["learning_rate"]) == (16, 0.02)
    assert curve(fitted, "hparams/val/f1_macro")[0][1] == curve(fitted, "val/f1_macro")[-1][1]


def test_a_checkpoint_holds_the_adapter_and_what_it_belongs_to(fitted: Path, llama: Path) -> None:
    import torch

    for name, step in (("last", 11), ("best", None)):
        path = fitted / "checkpoints" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"]
        assert all("lora_" in key for key in checkpoint["state_dict"])
        assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values())
        assert checkpoint["medlit"]["base_model"] == str(llama)
        assert checkpoint["medlit"]["labels"] == sorted(SPECIALTIES)
        assert "hyper_parameters" not in checkpoint
        assert step in (None, checkpoint["global_step"])
        assert path.stat().st_size < 1_000_000


def test_a_fit_in_a_log_prints_lines_and_no_bars_and_names_the_next_command(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["enable_progress_bar", "enable_model_summary"]
    config = yaml.safe_load(tiny_config.read_text())
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in quiet}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    outcome = run_medlit("fit", "--config", "tiny.yaml", "--trainer.max_steps", "5", "--run_dir", "my run")
    lines = [line for line in outcome.err.splitlines() if "checking that" not in line]  # the first fit does
    size, *validations, weights, test, predict, written = lines
    assert size == "medlit: training on 24 notes, validating on 8: 5 steps, 3 steps per epoch"
    assert [line.partition(":")[0] + line.partition(":")[2].partition(":")[0] for line in validations] == [
        f"medlit validation at step {step}" for step in (4, 5)
    ]
    assert (weights, written) == ("medlit: best weights: 'my run'/adapter", "medlit: written: my run")
    write_csv(tmp_path / "new.csv", notes()["test"])
    named = "medlit: weights: my run/checkpoints/best.ckpt\n"
    for command, said, file in (
        (test, f"{named}medlit: test: accuracy ", "report.html"),
        (predict, f"{named}medlit: written: my run/predictions.csv\n", "predictions.csv"),
    ):
        outcome = run_medlit(*shlex.split(command.partition(": medlit ")[2]))
        assert (outcome.code, outcome.out) == (0, "")
        assert outcome.err.startswith(said)
        assert all(line.startswith("medlit: ") for line in outcome.err.splitlines())
        assert (tmp_path / "my run" / file).is_file()


def test_a_log_has_a_line_for_each_slow_stage_before_the_first_step(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.errors.Timer", AtOnce)
    source = write_csv(tmp_path / "one.csv", [note for split in notes().values() for note in split])
    flags = ["--data.source", source, "--data.split.near_threshold", "0.9", "--trainer.max_steps", "1"]
    outcome = run_medlit("fit", "--config", tiny_config, *flags, "--run_dir", tmp_path / "run")
    lines = outcome.err.partition("medlit: training on ")[0].splitlines()
    lines = [line for line in lines if "checking that" not in line]
    model = yaml.safe_load(tiny_config.read_text())["model"]["language_model"]["base_model"]
    assert [re.sub(r"\d+", "N", line) if "notes" in line or "texts" in line else line for line in lines] == [
        f"medlit: reading {source}",
        "medlit: searching N texts for near duplicates",
        "medlit: splitting N notes",
        *["medlit: tokenising N notes"] * 3,
        f"medlit: loading {model}",
    ]


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_slow_import_is_reported_by_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, lines: int
) -> None:
    from medlit.__main__ import main

    monkeypatch.setattr("medlit.errors.Timer", AtOnce)
    monkeypatch.setattr("medlit.unsloth_first.import_unsloth", lambda: None)
    monkeypatch.setattr("medlit.cli.cli.main", lambda arguments: None)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", rank)
    main(["fit"])
    line = "medlit: importing Unsloth, which takes up to a minute from a cold disk\n"
    assert capsys.readouterr() == ("", line * lines)


def test_a_fit_from_python_is_the_command_s(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_medlit("fit", "--config", tiny_config, "--trainer.max_steps", "2", "--run_dir", "shell").code == 0
    run = package.fit(tiny_config, trainer__max_steps=2, run_dir=tmp_path / "python", data__labels__aliases={})
    assert run.run_dir == tmp_path / "python"
    assert run.metrics == scores(tmp_path / "shell" / "fit_metrics.json")
    assert run.adapter == run.run_dir / "adapter"
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.figures == [run.run_dir / "confusion_fit.png"]
    test = ["test", "--config", "shell/config_fit.yaml", "--run_dir", "shell", "--ckpt_path", "best"]
    assert run_medlit(*test, "--model.decoding.mode", "likelihood").code == 0
    tested = run.test(model__decoding__mode="likelihood")
    assert tested.metrics == scores(tmp_path / "shell" / "test_metrics.json")
    assert (tested.run_dir, tested.adapter) == (run.run_dir, run.adapter)
    assert run.run_dir / "confusion_test.png" in tested.figures
    trial = package.fit([tiny_config], trainer__fast_dev_run=True)
    assert (trial.metrics, trial.figures, trial.run_dir.exists()) == ({}, [], False)


def test_a_fit_and_a_test_from_python_leave_no_model_in_memory(tiny_config: Path, tmp_path: Path) -> None:
    from medlit.model.module import SpecialtyClassifier

    def models() -> set[int]:
        gc.collect()
        return {id(each) for each in gc.get_objects() if type(each) is SpecialtyClassifier}

    before = models()
    run = package.fit(tiny_config, trainer__max_steps=1, run_dir=tmp_path / "run")
    assert models() <= before
    run.test()
    assert models() <= before


def test_notes_and_prompt_of_a_fit_are_there_without_one(tiny_config: Path, tmp_path: Path) -> None:
    data = package.datamodule(tiny_config, data__instruction="Which ward?", model__language_model__max_length=200)
    notes = data.read_splits().notes
    assert {name: len(split) for name, split in notes.items()} == {"train": 24, "validation": 8, "test": 8}
    prompt = data.prompt.prompt(notes["test"][0]["transcription"])
    assert "### Instruction:\nWhich ward?\n" in data.prompt.tokenizer.decode(prompt.input_ids)
    assert data.prompt.max_length == 200
    with pytest.raises(package.UserError, match=r"did you mean data\.source"):
        package.datamodule(tiny_config, data__sauce="x")


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("tiny.yaml", {}, "config: there is no file tiny.yaml"),
        ([], {"trainer__max_stepz": 3}, "trainer.max_stepz: there is no such setting; did you mean trainer.max_steps?"),
        ([], {"trainer__max_steps": "many"}, "trainer.max_steps: must be an integer, not many"),
        ([], {"data__source": Path("nowhere.csv"), "run_dir": "new"}, "data.source: .*nowhere.csv"),
        ([], {"ckpt_path": "last"}, "ckpt_path: there is no last checkpoint"),
    ],
)
def test_a_mistake_from_python_is_an_error_and_leaves_nothing(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: object,
    overrides: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"model__language_model__base_model": str(llama), "trainer__accelerator": "cpu"}
    with pytest.raises(package.UserError, match=message):
        package.fit(config, **base | overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_touch_an_earlier_one(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_medlit("fit", "--config", tiny_config, "--trainer.max_steps", "1").code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert (run.with_name("version_1") / "checkpoints" / "last.ckpt").is_file()


def test_a_trial_run_leaves_nothing(
    run_medlit: Medlit, tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_medlit("fit", "--config", tiny_config, "--trainer.fast_dev_run", "true")
    assert outcome.code == 0
    assert "written" not in outcome.err
    assert not list(tmp_path.iterdir()), "no file, and no folder"


CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}
BOARD = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "elsewhere", "name": "board"}}


NOWHERE = {"class_path": "lightning.pytorch.loggers.logger.DummyLogger"}  # like those of a server, it has no folder


@pytest.mark.parametrize("logger", [False, NOWHERE, CSV, [CSV, BOARD]], ids=["none", "server", "folder", "two"])
def test_the_run_folder_is_the_same_with_any_logger(
    run_medlit: Medlit, run: Path, tiny_config: Path, logger: object
) -> None:
    """And `best` is what this fit trained, not the best of the run before it."""
    flags = ["--config", tiny_config, "--trainer.logger", json.dumps(logger)]
    outcome = run_medlit("fit", *flags, "--trainer.max_steps", "1")
    assert outcome.code == 0
    assert outcome.err.rstrip().endswith("medlit: written: logs/tiny/version_1")
    newer = run.with_name("version_1")
    names = {name for name in files(run) if "tfevents" not in name} - {"hparams.yaml"}
    assert files(newer) == names
    assert (run.parents[2] / "elsewhere").exists() == ("elsewhere" in json.dumps(logger))
    assert not [name for name in files(run.parents[2] / "elsewhere") if name.endswith((".ckpt", ".json"))]
    outcome = run_medlit("validate", *flags, "--ckpt_path", "best")
    assert outcome.err.rstrip().endswith("medlit: written: logs/tiny/version_1")
    found, fit = scores(newer / "validate_metrics.json"), scores(newer / "fit_metrics.json")
    assert found["loss"] == pytest.approx(fit["loss"], abs=1e-5)


def test_a_home_folder_for_the_runs(
    run_medlit: Medlit, tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    short = ["fit", "--config", tiny_config, "--trainer.default_root_dir", "~/runs", "--trainer.max_steps", "1"]
    assert [run_medlit(*short).code for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "me" / "runs" / "tiny").iterdir()) == ["version_0", "version_1"]
    assert [path.name for path in tmp_path.iterdir()] == ["me"]


def test_fit_resumes_from_the_last_checkpoint_in_the_same_folder(
    run_medlit: Medlit, run: Path, tiny_config: Path
) -> None:
    import torch

    best = max(value for _, value in curve(run, "val/f1_macro"))
    arguments = ["--config", tiny_config, "--ckpt_path", "last", "--trainer.max_steps", "14"]
    outcome = run_medlit("fit", *arguments)
    assert outcome.code == 0
    assert outcome.err.rstrip().endswith("medlit: written: logs/tiny/version_0")
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 14
    steps = [step for step, _ in curve(run, "train/loss")]
    assert steps == list(range(14))
    best = max(best, *(value for _, value in curve(run, "val/f1_macro")))
    run_medlit("validate", "--config", tiny_config, "--ckpt_path", "best")
    assert scores(run / "validate_metrics.json")["f1_macro"] == pytest.approx(best)


# --- from a checkpoint ------------------------------------------------------------------------------------------------


def test_another_length_limit_than_the_fit_s_is_told(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    said = "model.language_model.max_length: {} in the fit of the weights; notes are cut elsewhere now"
    length = yaml.safe_load((run / "config_fit.yaml").read_text())["model"]["language_model"]["max_length"]
    command = ["predict", "--config", tiny_config, "--ckpt_path", "best", "--data.predict.text", "A cough."]
    assert said.format(length) not in run_medlit(*command).err
    assert said.format(length) in run_medlit(*command, "--model.language_model.max_length", length - 1).err


def test_validate_from_the_best_reproduces_the_fit_s_best(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    assert run_medlit("validate", "--config", tiny_config, "--ckpt_path", "best").code == 0
    found = scores(run / "validate_metrics.json")
    assert set(found) == SCORES
    best = max(range(3), key=lambda i: curve(run, "val/f1_macro")[i][1])
    for name in ("accuracy", "any_of_accuracy", "balanced_accuracy", "f1_macro", "f1_weighted", "invalid_rate", "loss"):
        assert found[name] == pytest.approx(curve(run, f"val/{name}")[best][1], abs=1e-5), name
    assert {"config_validate.yaml", "confusion_validate.png"} <= files(run)


def test_the_share_of_notes_that_are_cut_is_reported(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    source, config = "--data.predict.source", ["--config", tiny_config, "--run_dir", tmp_path]
    base, short = ["--model.lora", "null", "--trainer.limit_predict_batches", "1"], tmp_path / "short.csv"
    short.write_text("id,transcription\n" + "".join(f"{i},pain\n" for i in range(9)) + f"9,{'pain ' * 200}\n")
    tenth = run_medlit("predict", *config, *base, source, short, "--output", tmp_path / "tenth.csv")
    assert (tenth.code, "are cut" in tenth.err) == (0, False)
    short.write_text(short.read_text() + f"10,{'pain ' * 200}\n")
    more = run_medlit("predict", *config, *base, source, short, "--output", tmp_path / "more.csv")
    assert re.search(r"medlit: 18% of the notes are cut to \d+ tokens; a larger model", more.err)


def test_a_fit_and_a_test_with_sets(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = ["--model.decoding.mode", "likelihood", "--model.decoding.coverage", "0.75", "--run_dir", run]
    often = ["--trainer.max_steps", "4", "--val_every_steps", "2"]
    fit = run_medlit("fit", "--config", tiny_config, *sets, *often)
    assert fit.code == 0, fit.err
    assert fit.err.count("medlit: validation at step") == 2
    few = "medlit: model.decoding.coverage: fewer than 3 validation notes"
    assert fit.err.count(few) == 1, "the third specialty has two"
    test = run_medlit("test", "--config", tiny_config, *sets, "--ckpt_path", "best")
    assert test.code == 0, test.err
    fitted, tested = (scores(run / f"{verb}_metrics.json")["sets"] for verb in ("fit", "test"))
    kept = json.loads((run / "adapter" / "medlit.json").read_text())["thresholds"]["mode=likelihood"]
    assert fitted["threshold"] == tested["threshold"] == kept["0.75"]
    assert fitted["coverage"] >= 0.75
    assert (run / "sets_test.png").is_file()
    assert curve(run, "test/set_coverage")[0][1] == pytest.approx(tested["coverage"])
    assert len(curve(run, "val/set_mean_size")) == 2
    assert "Guarantee: a set holds one" in (run / "report.md").read_text(encoding="utf-8")


def test_a_coverage_that_rests_on_training_notes_is_doubted(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    folder, rows = write_notes(tmp_path / "notes"), notes()
    rows["validation"][0] |= {key: rows["train"][6][key] for key in ("transcription", "medical_specialty")}
    write_csv(folder / "validation.csv", rows["validation"])
    settings = ["--data.source", folder, "--data.split.kind", "official", "--run_dir", tmp_path / "run"]
    settings += ["--model.decoding.mode", "likelihood", "--model.decoding.coverage", "0.6"]
    fit = run_medlit("fit", "--config", tiny_config, *settings, "--trainer.max_steps", "4", "--val_every_steps", "2")
    assert fit.code == 0, fit.err
    assert fit.err.count("model.decoding.coverage: validation texts that are training texts too: 1, so that ") == 1


def test_a_test_leaves_its_report(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_medlit("test", "--config", tiny_config, "--ckpt_path", "best").code == 0
    assert {"report.html", "report.md", "test_facts.json", "test_answers.parquet", "test_metrics.json"} <= files(run)
    facts = scores(run / "test_facts.json")
    assert facts["data"]["rows"] == {"train": 24, "validation": 8, "test": 8}
    assert facts["data"]["source"].endswith(str(yaml.safe_load(tiny_config.read_text())["data"]["source"]))
    assert facts["run"]["weights"].endswith("best.ckpt")
    page = (run / "report.html").read_text()
    assert f"{scores(run / 'test_metrics.json')['accuracy']:.1%}" in page
    texts = [note["transcription"] for split in notes().values() for note in split]
    for path in run.glob("*"):
        if path.suffix in (".html", ".md", ".json", ".parquet") or "tfevents" in path.name:
            assert not any(text.encode() in path.read_bytes() for text in texts), path
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"test/confusion", "test/classes", "test/length"} <= set(events.Tags()["images"])
    assert curve(run, "hparams/test/f1_macro")[0][1] == pytest.approx(scores(run / "test_metrics.json")["f1_macro"])


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("weights", ["checkpoint", "adapter"])
def test_an_evaluation_does_not_touch_the_curves_of_the_fit(
    run_medlit: Medlit, run: Path, tiny_config: Path, verb: str, weights: str
) -> None:
    """Its scores have tags of their own, at the step of its weights."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(run))
        events.Reload()
        return {tag: curve(run, tag) for tag in events.Tags()["scalars"]}

    before = curves()
    path = run / "checkpoints" / "best.ckpt"
    step = torch.load(path, weights_only=True)["global_step"] if weights == "checkpoint" else 0
    flags = ["--ckpt_path", path] if weights == "checkpoint" else ["--model.adapter", run / "adapter"]
    assert run_medlit(verb, "--config", tiny_config, *flags, "--run_dir", run).code == 0
    after = curves()
    assert {tag: after[tag] for tag in before} == before
    assert {tag.removeprefix("hparams/").partition("/")[0] for tag in after.keys() - before.keys()} == {verb}
    assert {each for tag in after.keys() - before.keys() for each, _ in after[tag]} == {step}
    found = scores(run / f"{verb}_metrics.json")
    assert curve(run, f"{verb}/f1_macro") == [(step, pytest.approx(found["f1_macro"]))]


def test_validate_from_the_last_reproduces_the_fit_s_last(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    assert run_medlit("validate", "--config", tiny_config, "--ckpt_path", "last").code == 0
    found, fit = scores(run / "validate_metrics.json"), scores(run / "fit_metrics.json")
    assert found.pop("loss") == pytest.approx(fit.pop("loss"), abs=1e-5)
    assert found == fit


def test_the_adapter_folder_is_the_best_checkpoint(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    arguments = ["test", "--config", tiny_config]
    assert run_medlit(*arguments, "--ckpt_path", "best").code == 0
    assert run_medlit(*arguments, "--model.adapter", run / "adapter", "--run_dir", run.with_name("adapted")).code == 0
    ours, theirs = scores(run / "test_metrics.json"), scores(run.with_name("adapted") / "test_metrics.json")
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), abs=1e-5)
    assert ours == theirs


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, llama: Path) -> tuple[Path, Path]:
    """The tiny model with a chat template, and the run folder of a fit with it."""
    from medlit.cli.cli import main

    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(llama, base := folder / "base")
    turns = "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>' }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    (base / "chat_template.jinja").write_text(template)
    names = ["--model.language_model.base_model", str(base), "--data.prompt_format", "chat"]
    steps = ["--trainer.max_steps", "4", "--run_dir", str(folder / "run")]
    main(["fit", "--config", str(tiny_config), *names, *steps])
    return base, folder / "run"


def test_an_adapter_of_a_chat_answers_with_the_chat_by_itself(
    run_medlit: Medlit, chat: tuple[Path, Path], tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlit import SpecialtyPredictor

    base, run = chat
    monkeypatch.chdir(tmp_path)
    metadata = json.loads((run / "adapter" / "medlit.json").read_text())
    text = "<s>user\n{instruction}\n{transcription}</s><s>assistant\n{specialty}</s>"
    assert (metadata["prompt"], metadata["template"]) == ("chat-1", text)
    command = ["--config", tiny_config, "--model.language_model.base_model", base]
    output = ["--data.predict.source", "test", "--output", tmp_path / "all.csv", "--model.decoding.mode", "likelihood"]
    predicted = run_medlit("predict", *command, "--model.adapter", run / "adapter", *output)
    assert predicted.code == 0, predicted.err
    assert f"medlit: taken from {run / 'adapter'}: data.prompt_format chat\n" in predicted.err
    given = notes()["test"]
    ours = SpecialtyPredictor.load(run, device="cpu").predict([row["transcription"] for row in given])
    with (tmp_path / "all.csv").open(newline="") as file:
        theirs = {row["id"]: row for row in csv.DictReader(file)}
    for row, one in zip(given, ours, strict=True):
        assert theirs[row["id"]]["answer"] == one.answer
        assert float(theirs[row["id"]]["probability"]) == pytest.approx(one.probability, abs=1e-4)
    for flags in (["--model.adapter", run / "adapter"], ["--ckpt_path", run / "checkpoints" / "best.ckpt"]):
        refused = run_medlit("test", *command, *flags, "--data.prompt_format", "alpaca")
        assert refused.code == 2
        assert "was trained with 'chat' and the config says 'alpaca'" in refused.err


@pytest.mark.slow
def test_the_export_of_a_chat_is_verified_with_the_chat(chat: tuple[Path, Path], tmp_path: Path) -> None:
    from medlit.tools.export import run as export

    assert export(["--run_dir", str(chat[1]), "--to", "merged", "--output", str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "\n<the note></s><s>assistant\n<the specialty></s>\n" in card
    assert "### Response:" not in card


def test_a_fit_from_peft_s_adapter_records_what_it_adopts(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = yaml.safe_load(tiny_config.read_text())["model"]["language_model"]["base_model"]
    values = {"r": 4, "lora_alpha": 64, "use_rslora": True, "target_modules": ["q_proj"], "alpha_pattern": {"1.+": 8}}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**values)).save_pretrained(
        tmp_path / "theirs"
    )
    arguments = ["--config", tiny_config, "--run_dir", tmp_path / "run"]
    begun = run_medlit("fit", *arguments, "--model.adapter", tmp_path / "theirs", "--trainer.max_steps", "1")
    assert begun.code == 0, begun.err
    adopted = {"r": 4, "alpha": 64, "rslora": True, "target_modules": ["q_proj"], "alpha_pattern": {"1.+": 8}}
    config = yaml.safe_load((tmp_path / "run" / "config_fit.yaml").read_text())["model"]["lora"]
    assert config | adopted == config
    metadata = json.loads((tmp_path / "run" / "adapter" / "medlit.json").read_text())["lora"]
    assert metadata | adopted == metadata
    peft = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert peft | values == peft
    settings = ["--config", tmp_path / "run" / "config_fit.yaml", "--run_dir", tmp_path / "run"]
    loss = []
    for weights in (["--ckpt_path", "best"], ["--model.adapter", tmp_path / "run" / "adapter"]):
        tested = run_medlit("test", *(settings if "--ckpt_path" in weights else arguments), *weights)
        assert tested.code == 0, tested.err
        loss.append(json.loads((tmp_path / "run" / "test_metrics.json").read_text())["loss"])
    assert loss[0] == pytest.approx(loss[1], abs=1e-4)


def test_a_text_part_s_adapter_is_read_by_peft_on_the_whole_model_and_by_every_command(
    run_medlit: Medlit, tiny_config: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from tiny_families import tiny_gemma3
    from transformers import AutoTokenizer

    from medlit import SpecialtyPredictor
    from medlit.tools.export import run as export

    AutoTokenizer.from_pretrained(llama).save_pretrained(base := tmp_path / "base")
    tiny_gemma3(vocab_size=768).save_pretrained(base)  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    model = ["--model.language_model.base_model", base, "--model.language_model.load_in_4bit", "false"]
    command = ["--config", tiny_config, *model, "--val_every_steps", "1", "--model.decoding.mode", "likelihood"]
    run = tmp_path / "run"
    for steps, more in (("1", []), ("2", ["--ckpt_path", "last"])):  # the second resumes
        done = run_medlit("fit", *command, *more, "--run_dir", run, "--trainer.max_steps", steps)
        assert done.code == 0, done.err
    assert all(".language_model.layers." in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    output = ["--run_dir", str(run), "--output", str(tmp_path / "out"), "--notes", "6", "--to", "adapter"]
    assert export(["--model.adapter", str(run / "adapter"), *output]) == 0, "a process without medlit and Unsloth"
    (row,) = json.loads((tmp_path / "out" / "verification.json").read_text())["exports"]
    assert row["against_medlit"]["all_max"] < 1e-4
    texts = [row["transcription"] for row in notes()["test"]]
    predicted = run_medlit("predict", *command, "--ckpt_path", "best", "--run_dir", run)
    assert predicted.code == 0, predicted.err
    by_class = SpecialtyPredictor.load(run, device="cpu").predict(texts)
    table = pd.read_csv(run / "predictions.csv")
    assert [one.probability for one in by_class] == pytest.approx(list(table["probability"]), abs=1e-4)


FP8 = ("--model.language_model.load_in_4bit", "false", "--model.language_model.load_in_fp8", "true")


def test_a_fit_on_fp8_weights_is_refused_on_a_cpu(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    outcome = run_medlit("fit", "--config", tiny_config, *FP8, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    message = "model.language_model.load_in_fp8: trains on GPUs from compute capability 8.9 on (L40S, H100); set it to"
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fp8_kernel")
def test_a_fit_on_fp8_weights_resumes_and_answers_in_every_way(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlit import SpecialtyPredictor

    monkeypatch.setattr("medlit.cli.cli.check_fp8", lambda *_: None)  # it needs a GPU
    command, run = ["--config", tiny_config, *FP8, "--run_dir", tmp_path / "run"], tmp_path / "run"
    for steps, more in (("2", []), ("4", ["--ckpt_path", "last"])):
        done = run_medlit("fit", *command, *more, "--trainer.max_steps", steps, "--val_every_steps", "2")
        assert done.code == 0, done.err
    for mode in ("generate", "constrained", "likelihood"):
        done = run_medlit("validate", *command, "--ckpt_path", "last", "--model.decoding.mode", mode)
        assert done.code == 0, done.err
    done = run_medlit("predict", *command, "--model.adapter", run / "adapter", "--model.decoding.mode", "likelihood")
    assert done.code == 0, done.err
    texts = [row["transcription"] for row in notes()["test"]]
    answers = SpecialtyPredictor.load(run, mode="likelihood", device="cpu").predict(texts)
    table = pd.read_csv(run / "predictions.csv")
    assert [one.specialty for one in answers] == list(table["specialty"])
    assert [one.probability for one in answers] == pytest.approx(list(table["probability"]), abs=1e-4)


def test_an_adapter_in_a_closed_folder_costs_no_number(
    run_medlit: Medlit, run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkstemp

    def mkstemp(*given: Any, **named: Any) -> tuple[int, str]:  # noqa: ANN401 - as the real one
        if named.get("dir") == run / "adapter":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(*given, **named)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    before = (run / "adapter" / "medlit.json").read_bytes()
    weighed = ["--model.decoding.mode", "likelihood", "--model.adapter", run / "adapter"]
    outcome = run_medlit("validate", "--config", tiny_config, *weighed)
    assert outcome.code == 0
    told = f"is not kept with the adapter: {run / 'adapter' / 'medlit.json'} cannot be written (Permission denied)"
    assert outcome.err.count(told) == 1
    assert scores(run.with_name("version_1") / "validate_metrics.json")["temperature"] > 0
    assert (run / "adapter" / "medlit.json").read_bytes() == before


def test_peft_alone_loads_the_adapter_and_gives_the_same_answers(
    run_medlit: Medlit, run: Path, tiny_config: Path, llama: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from medlit.data.prompt import AlpacaPrompt

    assert run_medlit("predict", "--config", tiny_config, "--ckpt_path", "best").code == 0
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(llama, quantization_config=quantised, device_map={"": "cpu"})
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    prompt = AlpacaPrompt(tokenizer, max_length=112, max_response_tokens=8)
    answers = []
    for note in notes()["test"]:
        ids = torch.tensor([prompt.prompt(note["transcription"]).input_ids])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers == list(pd.read_csv(run / "predictions.csv")["answer"])


@pytest.mark.parametrize("word", ["best", "last"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_best_and_last_without_a_checkpoint_exit_2_before_lightning(
    run_medlit: Medlit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, word: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the trainer was made")

    monkeypatch.setattr("medlit.cli.cli.MedlitCLI.instantiate_trainer", never)
    monkeypatch.chdir(tmp_path)
    outcome = run_medlit(verb, "--ckpt_path", word)
    assert outcome.code == 2
    assert f"there is no {word} checkpoint in any run in {Path('logs/medlit').absolute()}" in outcome.err
    assert files(tmp_path) == set()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_trained_run_is_not_evaluated_with_untrained_weights(
    run_medlit: Medlit, run: Path, tiny_config: Path, verb: str
) -> None:
    before = files(run)
    outcome = run_medlit(verb, "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    assert "no weights are named; add --ckpt_path best" in outcome.err
    assert files(run) == before
    (run / "checkpoints" / "best.ckpt").unlink()
    outcome = run_medlit(verb, "--config", tiny_config, "--run_dir", run)
    assert "no weights are named; add --ckpt_path last" in outcome.err


@pytest.mark.usefixtures("run")
def test_a_test_without_weights_says_so(run_medlit: Medlit, tiny_config: Path) -> None:
    outcome = run_medlit("test", "--config", tiny_config)
    assert outcome.code == 0
    assert "weights: none are named, so the base model answers; --ckpt_path best takes those of a fit" in outcome.err


def test_best_is_that_of_the_newest_run_or_of_run_dir(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    newer = run.with_name("version_1")
    shutil.copytree(run, newer)
    arguments = ["validate", "--config", tiny_config, "--ckpt_path", "best"]
    assert run_medlit(*arguments).code == 0
    assert "validate_metrics.json" in files(newer) - files(run)
    assert run_medlit(*arguments, "--run_dir", run).code == 0
    assert "validate_metrics.json" in files(run)


def test_a_checkpoint_by_its_path(run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "kept.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", elsewhere)
    assert run_medlit("validate", "--config", tiny_config, "--ckpt_path", elsewhere).code == 0
    found = scores(run.with_name("version_1") / "validate_metrics.json")
    assert found["confusion"] == scores(run / "fit_metrics.json")["confusion"]


def test_a_flag_wins_over_what_a_checkpoint_saw(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    arguments = ["--config", tiny_config, "--ckpt_path", "last", "--model.decoding.max_new_tokens", "1"]
    assert run_medlit("validate", *arguments).code == 0
    saved = yaml.safe_load((run / "config_validate.yaml").read_text())
    assert saved["model"]["decoding"]["max_new_tokens"] == 1
    long = scores(run / "fit_metrics.json")["confusion"]
    assert scores(run / "validate_metrics.json")["confusion"] != long  # the longest label has 3 tokens


@pytest.mark.parametrize(
    ("mode", "why"), [("generate", "'generate' uses none"), ("likelihood", "these weights have none")]
)
def test_a_test_without_its_prior_says_so(
    run_medlit: Medlit, run: Path, tiny_config: Path, mode: str, why: str
) -> None:
    flags = ["--ckpt_path", "best", "--model.decoding.prior", "tfidf", "--model.decoding.mode", mode]
    outcome = run_medlit("test", "--config", tiny_config, *flags)
    assert outcome.code == 0
    assert outcome.err.count("model.decoding.prior") == 1
    assert f"medlit: model.decoding.prior: {why}, so the language model answers alone\n" in outcome.err


# --- predict ----------------------------------------------------------------------------------------------------------


def test_a_predict_leaves_no_empty_log(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    before = files(run)
    assert (
        run_medlit("predict", "--config", tiny_config, "--ckpt_path", "best", "--output", "new/folder/a.csv").code == 0
    )
    assert Path("new/folder/a.csv").is_file()
    assert files(run) - before == {"config_predict.yaml"}


def test_predictions_in_each_format_are_the_same_table(run_medlit: Medlit, run: Path, tiny_config: Path) -> None:
    weighed = ["--model.decoding.mode", "likelihood", "--model.decoding.abstain_below", "0"]
    arguments = ["predict", "--config", tiny_config, "--ckpt_path", "best", *weighed]
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        assert run_medlit(*arguments, "--output", name).code == 0
    tables = [
        pd.read_csv("out.csv", dtype={"id": str}),
        pd.read_json("out.jsonl", lines=True, dtype={"id": str}, precise_float=True),
        pd.read_parquet("out.parquet"),
    ]
    for table in tables:
        assert tuple(table.columns) == COLUMNS
        assert list(table["id"]) == [note["id"] for note in notes()["test"]]
        assert table.to_dict("records") == tables[0].to_dict("records")
    assert set(tables[0]["specialty"]) <= set(SPECIALTIES)
    assert not list(Path().glob(".*"))


def test_an_answer_off_the_list_has_no_specialty(
    run_medlit: Medlit, tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        assert run_medlit("predict", "--config", tiny_config, "--output", name).code == 0  # untrained: gibberish
    with open("out.csv", encoding="utf-8", newline="") as file:
        assert {row["specialty"] for row in csv.DictReader(file)} == {""}
    with open("out.jsonl", encoding="utf-8") as file:
        assert {json.loads(line)["specialty"] for line in file} == {None}
    assert pd.read_parquet("out.parquet")["specialty"].isna().all()


def test_a_table_without_labels_is_classified(run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    rows = [{"id": f"00{i}", "transcription": note["transcription"]} for i, note in enumerate(notes()["train"])]
    table = write_csv(tmp_path / "unlabelled.csv", rows)
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--data.predict.source", table]
    assert run_medlit("predict", *arguments).code == 0
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert {row["specialty"] for row in found} <= {*SPECIALTIES, ""}
    assert int(found[0]["cut_tokens"]) > 0
    assert found[1]["cut_tokens"] == "0"


def test_one_note_prints_its_answer_and_writes_nothing(
    run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    before = files(tmp_path)
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]  # a config that trains on more than one
    arguments = ["predict", "--config", tiny_config, *several, "--ckpt_path", "best", "--data.predict.text"]
    outcome = run_medlit(*arguments, "Patient 30 years old, since Monday: heart pain.")
    assert outcome.code == 0
    assert outcome.out.strip()
    assert len(outcome.out.splitlines()) == 1
    assert files(tmp_path) == before
    likelihood = run_medlit(
        *arguments, "Patient 30 years old, since Monday: heart pain.", "--model.decoding.mode=likelihood"
    )
    likeliest = likelihood.out.strip()
    fault = "" if outcome.out.strip() in SPECIALTIES else "the answer is no specialty; the most likely one is "
    named = "medlit: weights: logs/tiny/version_0/checkpoints/best.ckpt\n"
    assert outcome.err == likelihood.err.replace(f"{named}medlit: ", f"{named}medlit: {fault}{likeliest}: ")
    odds = rf"medlit: {fault}{likeliest}: probability 0.\d+, margin -?0.\d+, runner-up \w"
    assert re.match(odds, outcome.err.removeprefix(named))


def test_one_note_whose_answer_is_no_specialty_says_so(
    run_medlit: Medlit, run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an answer that is cut short."""
    arguments = ["predict", "--config", tiny_config, "--ckpt_path", "best", "--data.predict.text", "Heart pain."]
    made: list[list[Prediction]] = []

    def wrong_at_first(*inputs: Any) -> list[Prediction]:  # noqa: ANN401
        made.append(make_predictions(*inputs))
        wrong = {"specialty": None, "answer": "Medicine"} if len(made) == 1 else {}
        return [replace(prediction, **wrong) for prediction in made[-1]]

    monkeypatch.setattr("medlit.callbacks.predictions.make_predictions", wrong_at_first)
    outcome = run_medlit(*arguments)
    assert outcome.out == "Medicine\n"
    assert outcome.err.splitlines()[1].startswith("medlit: the answer is no specialty; the most likely one is ")


def test_one_note_from_standard_input(
    run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "Patient 30 years old, since Monday:\nheart pain."
    arguments = ["predict", "--config", str(tiny_config), "--ckpt_path", "best", "--data.predict.text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(note.encode())))
    before = files(tmp_path)
    assert run_medlit(*arguments, "-").out == run_medlit(*arguments, note).out
    assert files(tmp_path) == before


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_do_what_one_does(run_medlit: Medlit, fitted: Path, tiny_config: Path, tmp_path: Path) -> None:
    ddp = SOURCE.parent / "configs" / "hardware" / "ddp.yaml"
    two = ["--config", str(tiny_config), "--config", str(ddp), "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    python("-m", "medlit", "fit", *two, cwd=tmp_path)
    run = tmp_path / "logs" / "tiny" / "version_0"
    assert files(run) - {path.name for path in run.glob("events*")} == (
        files(fitted) - {path.name for path in fitted.glob("events*")}
    )
    for tag in ("train/loss", "val/loss", "val/accuracy"):
        assert curve(run, tag) == [(step, pytest.approx(value, abs=1e-4)) for step, value in curve(fitted, tag)]
    ours, theirs = (pd.read_parquet(folder / "fit_answers.parquet") for folder in (run, fitted))
    assert ours["id"].tolist() == theirs["id"].tolist()
    assert ours["truth"].tolist() == theirs["truth"].tolist()
    python("-m", "medlit", "predict", *two, "--ckpt_path", "last", "--output", "two.csv", cwd=tmp_path)
    one = tmp_path / "one.csv"
    arguments = ["--config", tiny_config, "--ckpt_path", run / "checkpoints" / "last.ckpt", "--output", one]
    assert run_medlit("predict", *arguments).code == 0
    assert one.read_text() == (tmp_path / "two.csv").read_text()


def test_the_bare_base_model_is_tested_without_an_adapter(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    flags = ["--model.lora", "null", "--run_dir", tmp_path / "bare"]
    outcome = run_medlit("test", "--config", tiny_config, *flags)
    assert outcome.code == 0
    assert "none are named" not in outcome.err
    metrics = json.loads((tmp_path / "bare" / "test_metrics.json").read_text())
    assert metrics["n"] == 8


def test_the_best_checkpoint_of_another_monitor_is_tested(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    flags = ["--config", tiny_config, "--run_dir", tmp_path / "run"]
    monitor = ["--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min", "--trainer.max_steps", "1"]
    assert run_medlit("fit", *flags, *monitor).code == 0
    assert run_medlit("test", *flags, "--ckpt_path", "best").code == 0
