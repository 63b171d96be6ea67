"""`--help` is the manual: short, complete, and free of its parser's jargon."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest

from medlit.__main__ import main as entry
from medlit.cli import MODEL_VERBS, TOOLS
from medlit.cli.help import ABOUT, LIGHTNING_HELP, TEXTS
from medlit.evaluation.metrics import MONITORS

if TYPE_CHECKING:
    from conftest import Medlit

FLAG = re.compile(r"^  (?:-\w [A-Z]+, )?--([\w.]+)", re.MULTILINE)
# medlit's own settings, without those that are linked.
OWN = ("model.", "data.")


@pytest.fixture(scope="module")
def manuals() -> dict[str, str]:
    """Help of each verb that runs a model, by verb, 120 columns wide."""
    import contextlib
    import io

    from medlit.cli.cli import main

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        for verb in MODEL_VERBS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
                main([verb, "--help"])
            assert stop.value.code == 0
            found[verb] = out.getvalue()
    return found


def settings(run_medlit: Medlit, verb: str) -> set[str]:
    """Every setting that a verb prints with --print_config, with its groups."""
    import yaml

    found: set[str] = set()

    def walk(values: dict[str, object], before: str) -> None:
        for name, value in values.items():
            found.add(before + name)
            if isinstance(value, dict):
                walk(value, f"{before}{name}.")

    walk(yaml.safe_load(run_medlit(verb, "--print_config").out), "")
    return found


def test_a_setting_of_one_word_or_null_is_described() -> None:
    from typing import Literal

    from medlit.cli.help import describe

    assert describe(Literal["tfidf"] | None) == "'tfidf' or null"
    assert describe(Literal["a", "b", "c"]) == "'a', 'b' or 'c'"


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_a_manual_begins_with_what_the_verb_is_for_and_examples(manuals: dict[str, str], verb: str) -> None:
    head = manuals[verb].split("options:")[0]
    assert head.startswith(f"usage: medlit {verb} [--config FILE ...]")
    assert f"\nexamples:\n  medlit {verb} " in head
    assert len(head.splitlines()) < 25


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_a_manual_has_no_markup_and_no_lists_of_classes(manuals: dict[str, str], verb: str) -> None:
    for noise in ("``", ":class:", ":paramref:", "ENV:", "ARG:", "known subclasses", "Union[", "Optional[", "None"):
        assert noise not in manuals[verb], noise
    assert max(map(len, manuals[verb].splitlines())) <= 120
    assert len(manuals[verb].splitlines()) < 290


def test_every_setting_of_medlit_is_in_a_manual(manuals: dict[str, str], run_medlit: Medlit) -> None:
    listed = {name for text in manuals.values() for name in FLAG.findall(text)}
    groups = {name for name in settings(run_medlit, "fit") if any(n.startswith(f"{name}.") for n in listed)}
    missing = {name for name in settings(run_medlit, "fit") if name.startswith(OWN)} - listed - groups
    assert missing == set()


def test_every_documented_setting_exists(run_medlit: Medlit) -> None:
    known = {verb: settings(run_medlit, verb) for verb in MODEL_VERBS}
    anywhere = set().union(*known.values())
    # Lightning takes what belongs to a method out of the settings that it prints.
    apart = {"config", "print_config", "ckpt_path", "verbose", *TEXTS["hidden"]}
    assert set(LIGHTNING_HELP) - apart <= anywhere
    assert set(TEXTS["titles"]) - apart <= anywhere
    for name in TEXTS["fit_only"]:
        assert any(setting.startswith(name) for setting in known["fit"]), name
    for name, verbs in TEXTS["verbs"].items():
        assert all(name in known[verb] for verb in verbs), name


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_the_examples_use_settings_that_exist(manuals: dict[str, str], verb: str) -> None:
    lines = ABOUT[verb].replace("\\\n", " ").splitlines()
    examples = [line for line in lines if line.startswith("  medlit ")]
    assert 2 <= len(examples) <= 4
    for example in examples:
        names = [word[2:].partition("=")[0] for word in shlex.split(example, comments=True) if word.startswith("--")]
        assert set(names) <= set(FLAG.findall(manuals[verb])), example


def test_the_short_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out.partition("commands:")[2].partition("examples:")[0]
    assert tuple(line.split()[0] for line in listed.strip().splitlines()) == MODEL_VERBS + TOOLS


@pytest.mark.parametrize("verb", [verb for verb in TOOLS if verb != "doctor"])
def test_the_manual_of_a_tool_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry([verb, "--help"])
    assert stop.value.code == 0
    assert f"\nexamples:\n  medlit {verb} " in capsys.readouterr().out


@pytest.mark.parametrize("monitor", MONITORS)
def test_the_help_names_every_metric_that_can_be_monitored(monitor: str) -> None:
    assert monitor in LIGHTNING_HELP["checkpoint.monitor"]
