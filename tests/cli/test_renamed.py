"""Settings of release 0.1 exit 2 with their new name, as a flag, in a YAML file and as an environment variable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from medlit.cli.validation import OLD_VALUES, REMOVED, RENAMED, advice
from medlit.errors import UserError

if TYPE_CHECKING:
    from conftest import Medlit

BACKBONE = "base_model revision max_length load_in_4bit dtype gradient_checkpointing memory_budget_gib".split()
NAMES = [*(name for name in RENAMED if name != "model.backbone"), *(f"model.backbone.{name}" for name in BACKBONE)]
CASES = [(name, "x") for name in [*NAMES, *REMOVED]] + list(OLD_VALUES)
FORMS = ("flag", "flag with =", "yaml", "variable")


def give(form: str, name: str, value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: ANN401
    """Set a variable, write a YAML file or neither; returns the arguments that go with it."""
    text = "off" if value is False else value
    if form == "flag":
        return [f"--{name}", text]
    if form == "flag with =":
        return [f"--{name}={text}"]
    if form == "variable":
        monkeypatch.setenv(f"MEDLIT_FIT__{name.upper().replace('.', '__')}", text)
        return []
    nested = value
    for key in reversed(name.split(".")):
        nested = {key: nested}
    (folder / "old.yaml").write_text(yaml.safe_dump(nested))
    return ["--config", str(folder / "old.yaml")]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Names of all settings that there are now."""
    from medlit.cli.arguments import make_parser
    from medlit.cli.help import setting_names

    return {*setting_names(make_parser("fit"))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "value"), CASES)
def test_an_old_setting_is_refused_with_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | bool, form: str
) -> None:
    from medlit.cli.validation import check_given

    args = give(form, name, value, tmp_path, monkeypatch)
    with pytest.raises(UserError) as refused:
        check_given(args, "MEDLIT_FIT__")
    message = str(refused.value)
    assert message.startswith(f"{name}: {advice(name, value)}")
    assert message.count(". ") == 0, "one sentence"
    assert message.endswith(").")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("data.batch_size", "4", "renamed to data.batching.micro_batch_size"),
        ("run", "x", "renamed to run_dir"),
        ("data.split", "grouped", "set data.split.kind to grouped"),
        ("model.adapter", "none", "set model.lora to null"),
        (
            "model.backbone.gradient_checkpointing",
            "off",
            "language_model.gradient_checkpointing, where 'off' is now 'none'",
        ),
        ("data.loss_on", "whole", "data.mask_prompt: true for 'response', false for 'whole'"),
        ("model.optimizer.loraplus_ratio", "16", "removed, since LoRA+ did not improve accuracy"),
    ],
)
def test_the_command_exits_2(
    run_medlit: Medlit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str, form: str
) -> None:
    outcome = run_medlit("fit", *give(form, name, value, tmp_path, monkeypatch), "--print_config")
    assert outcome.code == 2
    assert outcome.err.startswith(f"medlit: {name}: ")
    assert says in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_tool_refuses_them_too() -> None:
    from medlit.cli.arguments import parse_settings

    with pytest.raises(UserError, match=r"data.text_column: renamed to data.columns.text"):
        parse_settings("audit", ["--data.text_column", "note"])


def test_all_old_settings_of_a_file_are_in_one_message(run_medlit: Medlit, tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("run: x\ndata: {batch_size: 4, keep: head, text_column: note}\nmodel: {backbone: {dtype: auto}}\n")
    message = run_medlit("fit", "--config", path).err
    for new in (
        "run_dir",
        "micro_batch_size",
        "leave it out",
        "data.columns.text",
        "model.language_model.dtype",
        str(path),
    ):
        assert new in message


def test_the_text_of_a_note_is_not_repeated(run_medlit: Medlit) -> None:
    outcome = run_medlit("predict", "--data.text", "CHIEF COMPLAINT: Jane Roe of Elm Street")
    assert outcome.code == 2
    assert "Jane" not in outcome.err


def test_new_names_exist_and_old_ones_do_not(known: set[str]) -> None:
    for name in [*NAMES, *REMOVED]:
        assert name not in known - {"data.split"}, name
    for name in NAMES:
        new = str(advice(name, None)).removeprefix("renamed to ")
        assert new in known, name


def test_settings_of_today_have_no_advice(known: set[str]) -> None:
    for name in known:
        for value in ("null", "none", "4", None, True):
            assert advice(name, value) is None or (name, value) in OLD_VALUES, name


def test_a_config_may_be_a_long_text_instead_of_a_file() -> None:
    from medlit.cli.arguments import parse_settings

    text = json.dumps({"data": {"source": "builtin", "instruction": "Classify. " * 500}})
    assert parse_settings("baseline", ["--config", text]).data.instruction.startswith("Classify.")


def test_an_old_setting_in_a_config_that_is_a_text_is_refused() -> None:
    from medlit.cli.arguments import parse_settings

    with pytest.raises(UserError, match=r"data\.batch_size: renamed to .* \(the text of --config\)"):
        parse_settings("baseline", ["--config", json.dumps({"data": {"batch_size": 4}})])
