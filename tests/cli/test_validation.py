"""Which of two limits counts, and what a config may not say twice, without building anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from medlit.cli.validation import check_given, settle_length
from medlit.errors import UserError

if TYPE_CHECKING:
    from conftest import Medlit

STEPS, EPOCHS = "--trainer.max_steps", "--trainer.max_epochs"


def limits(run_medlit: Medlit, *arguments: object) -> tuple[int, int | None]:
    """`max_steps` and `max_epochs` that a fit would use."""
    outcome = run_medlit("fit", *arguments, "--print_config")
    assert outcome.code == 0, outcome.err
    trainer = yaml.safe_load(outcome.out)["trainer"]
    return trainer["max_steps"], trainer["max_epochs"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Path]:
    """Configs that limit steps, epochs or both."""
    texts = {"steps": {"max_steps": 40}, "epochs": {"max_epochs": 2}, "both": {"max_steps": 7, "max_epochs": 5}}
    texts["no steps"] = {"max_steps": -1}
    for name, trainer in texts.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    return {name: tmp_path / f"{name}.yaml" for name in texts}


@pytest.mark.parametrize(
    ("configs", "flags", "expected"),
    [
        ([], [], (60, None)),
        ([], [f"{EPOCHS}=3"], (-1, 3)),
        ([], [f"{STEPS}=9", EPOCHS, "3"], (9, 3)),
        ([], ["--trainer", "{max_epochs: 3}"], (-1, 3)),
        (["steps"], [], (40, None)),
        (["steps"], [EPOCHS, "3"], (-1, 3)),
        (["steps", "epochs"], [], (-1, 2)),
        (["epochs", "steps"], [], (40, None)),
        (["epochs"], [STEPS, "9"], (9, None)),
        (["both"], [], (7, 5)),
        (["steps", "both"], [], (7, 5)),
        (["both"], [EPOCHS, "3"], (-1, 3)),
        (["epochs"], [STEPS, "-1"], (-1, 2)),
        (["epochs", "no steps"], [], (-1, 2)),
        (["steps"], [EPOCHS, "null"], (40, None)),
        (["epochs"], [EPOCHS, "null"], (60, None)),
        (["steps", "epochs"], [EPOCHS, "null"], (40, None)),
        (["both"], [EPOCHS, "null"], (7, None)),
        (["both"], [STEPS, "-1"], (-1, 5)),
    ],
)
def test_the_limit_given_last_counts(
    run_medlit: Medlit, config: dict[str, Path], configs: list[str], flags: list[str], expected: tuple[int, int | None]
) -> None:
    layers = [argument for name in configs for argument in ("--config", config[name])]
    assert limits(run_medlit, *layers, *flags) == expected


def test_a_config_after_a_flag_overrides_it(run_medlit: Medlit, config: dict[str, Path]) -> None:
    assert limits(run_medlit, EPOCHS, "3", "--config", config["steps"]) == (40, None)
    assert limits(run_medlit, EPOCHS, "3", "--config", config["both"]) == (7, 5)


def test_a_config_counts_after_the_environment(
    run_medlit: Medlit, config: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLIT_FIT__TRAINER__MAX_EPOCHS", "3")
    assert limits(run_medlit) == (-1, 3)
    assert limits(run_medlit, "--config", config["steps"]) == (40, None)
    monkeypatch.setenv("MEDLIT_FIT__CONFIG", str(config["steps"]))
    assert limits(run_medlit) == (40, 3), "variables and the config that one names are one layer"


def test_a_tool_settles_the_length_as_fit_does(config: dict[str, Path]) -> None:
    from medlit.cli.arguments import parse_settings

    trainer = parse_settings("baseline", [f"-c{config['steps']}", EPOCHS, "3"]).trainer
    assert (trainer.max_steps, trainer.max_epochs) == (-1, 3)
    trainer = parse_settings("baseline", ["--config", json.dumps({"trainer": {"max_epochs": 2}})]).trainer
    assert (trainer.max_steps, trainer.max_epochs) == (-1, 2)


def test_other_arguments_stay_as_they_are(tmp_path: Path) -> None:
    (own := tmp_path / "x.yaml").write_text("seed_everything: 1\n")
    given = ["--config", str(own), "--model.lora.r", "4", "--data.predict.text", "- trainer.max_epochs: 3"]
    assert settle_length(given, "MEDLIT_FIT__") == given


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("model:\n  lora:\n    r: 8\nmodel:\n  lora:\n    alpha: 8\n", "model", (4, 1)),
        ("model:\n  lora:\n    r: 8\n    r: 4\n", "model.lora.r", (4, 3)),
        ("data: {source: a}\nval_every_steps: 3\nval_every_steps: 3\n", "val_every_steps", (3, 2)),
        ("model.lora.r: 8\nmodel:\n  lora: {alpha: 8}\n", "model.lora.r", (1, 2)),
        ("model:\n  lora: {alpha: 8}\n  lora.r: 8\n", "model.lora.r", (3, 2)),
        ('{"data": {"source": "a",\n"source": "b"}}', "data.source", (2, 1)),
        ("trainer:\n  callbacks:\n  - class_path: X\n    class_path: Y\n", "trainer.callbacks.class_path", (4, 3)),
    ],
)
@pytest.mark.parametrize("form", ["file", "text", "second layer", "variable"])
def test_a_key_given_twice_is_refused_with_its_lines(
    run_medlit: Medlit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    key: str,
    lines: tuple[int, int],
    form: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twice.yaml").write_text(text)
    Path("first.yaml").write_text("val_every_steps: 3\n")
    given = {"file": ["-c", "twice.yaml"], "text": ["--config", text], "variable": []}
    if form == "variable":
        monkeypatch.setenv("MEDLIT_FIT__CONFIG", "twice.yaml")
    outcome = run_medlit(
        "fit", *given.get(form, ["--config", "first.yaml", "--config", "twice.yaml"]), "--print_config"
    )
    assert outcome.code == 2
    where = "the given text" if form == "text" else "twice.yaml"
    assert outcome.err.startswith(f"medlit: {key}: given in line {lines[0]} of {where} and")
    assert f"in line {lines[1]}, where" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_the_file_of_a_group_is_named(run_medlit: Medlit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text("lora:\n  r: 8\n  r: 4\n")
    for given in (["--model", "model.yaml"], ["--config", "{model: model.yaml}"]):
        assert "lora.r: given in line 3 of model.yaml and" in run_medlit("fit", *given, "--print_config").err


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {r: 1}\nb: {<<: *a, r: 2}",
        "data: {labels: {aliases: {E: x, E.N.T.: y}}}",
        "model.lora.r: 8\nmodel.lora.alpha: 8",
        "a: &a [*a]",
        "- {a: 1}\n- {a: 2}",
    ],
)
def test_what_is_given_once_is_read(text: str) -> None:
    from medlit.cli.help import load_unique

    assert load_unique(text)


def test_a_note_that_looks_like_a_mapping_is_a_text(run_medlit: Medlit) -> None:
    note = "HISTORY: a\nHISTORY: b"
    outcome = run_medlit("predict", "--data.predict.text", note, "--data.instruction", note, "--print_config")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["data"]["predict"]["text"] == note


@pytest.mark.parametrize("value", ["3", "abc", "null", "[1]", "true"])
@pytest.mark.parametrize("group", ["trainer", "model", "model.language_model", "data", "checkpoint", "early_stopping"])
def test_one_value_for_a_group_of_settings_is_refused(tmp_path: Path, group: str, value: str) -> None:
    outer, _, inner = group.partition(".")
    (tmp_path / "a.yaml").write_text(f"{outer}: {f'{{{inner}: {value}}}' if inner else value}\n")
    for flags in (["--config", str(tmp_path / "a.yaml")], [f"--{group}={value}"]):
        with pytest.raises(UserError, match=f"^{group}: must be a group of settings, not "):
            check_given(flags, "MEDLIT_FIT__")
    (tmp_path / "a.yaml").write_text("{}")
    check_given([f"--{group}", str(tmp_path / "a.yaml")], "MEDLIT_FIT__")


def test_a_group_of_a_config_may_be_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: parts/model.yaml\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("lora:\n  r: 8\n")
    check_given(["--config", str(tmp_path / "a.yaml")], "MEDLIT_FIT__")
    (tmp_path / "parts" / "model.yaml").write_text("8\n")
    with pytest.raises(UserError, match=r"^model: must be a group of settings, not 8"):
        check_given(["--config", str(tmp_path / "a.yaml")], "MEDLIT_FIT__")
