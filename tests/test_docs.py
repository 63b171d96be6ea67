"""The documents agree with the code: commands parse, links and targets exist, the settings page is current."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import pytest
import yaml

from medlit import __version__
from medlit.__main__ import main as entry
from medlit.cli import MODEL_VERBS, TOOLS
from medlit.cli.validation import RENAMED
from medlit.data.label_errors import LABELS_CHECKED

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Placeholders for a config; everything else is parsed as it stands.
_PLACEHOLDERS = re.compile(r"(?<=--config )FILE\b")


def blocks(language: str) -> list[str]:
    """Fenced code blocks of one language, on all pages."""
    return [body for page in PAGES for found, body in _BLOCK.findall(page.read_text("utf-8")) if found == language]


def lines() -> set[str]:
    """Shell lines of the sh blocks, with continuations joined and comments removed."""
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    parts = (part for line in joined.splitlines() for part in re.split(r"\s&&\s", line.partition(" #")[0]))
    return {" ".join(part.split()) for part in parts if part.strip()}


def inline() -> set[str]:
    """Code within sentences and tables."""
    return {code for page in PAGES for code in _INLINE.findall(_BLOCK.sub("", page.read_text("utf-8")))}


def commands() -> list[str]:
    """Every `medlit <command> ...` of the pages; within a sentence a bare name is no command."""
    found = {line for line in lines() if re.match(r"medlit [a-z]", line)}
    found |= {code for code in inline() if re.match(r"medlit [a-z]+ -", code)}
    return sorted(found)


class Built(Exception):
    """The command line has its parser and has not read anything."""


class Parsed(Exception):
    """A tool has read its flags; the others are settings."""


@cache
def parser(verb: str) -> LightningArgumentParser:
    """The parser of a command that runs a model."""
    from medlit.cli.cli import MedlitCLI, main

    def stop(self: MedlitCLI, parser: LightningArgumentParser, args: object) -> None:
        raise Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MedlitCLI, "parse_arguments", stop)
        with pytest.raises(Built) as built:
            main([verb])
    return cast("LightningArgumentParser", built.value.args[0])


def settings_of_tool(tool: str, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> list[str]:
    """Parse a tool's own flags with its own parser; returns the settings behind them."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: None = None) -> None:
        options, rest = parse(self, args, namespace)
        configs = getattr(options, "config", None) or []
        raise Parsed([*(word for config in configs for word in ("--config", config)), *rest])

    with patch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parsed) as parsed:
            entry([tool, *arguments])
    return list(parsed.value.args[0])


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_settings", ROOT / "docs" / "generate_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_no_line_of_prose_is_far_longer_than_its_neighbours(page: Path) -> None:
    prose = _BLOCK.sub("", page.read_text("utf-8")).splitlines()
    assert [line for line in prose if len(line) > 126 and not line.lstrip().startswith(("|", "!["))] == []


def test_the_audit_s_limits_are_those_of_the_code() -> None:
    body = " ".join((ROOT / "docs" / "data.md").read_text("utf-8").split())
    assert (
        f"Tables with fewer than three different texts per label, or over {LABELS_CHECKED} labels, are left out" in body
    )


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(_PLACEHOLDERS.sub("configs/quickstart.yaml", command).partition(" < ")[0])
    verb, arguments = words[1], words[2:]
    assert verb in {*MODEL_VERBS, *TOOLS}
    arguments = [word for word in arguments if word not in ("--help", "--print_config")]
    if verb in TOOLS:
        verb, arguments = "fit", settings_of_tool(verb, arguments, monkeypatch)
    assert parser(verb).parse_args([verb, *arguments]).subcommand == verb


def test_there_are_commands_of_every_kind() -> None:
    assert {command.split()[1] for command in commands()} == {*MODEL_VERBS, *TOOLS}


@pytest.mark.parametrize("body", blocks("yaml"))
def test_every_yaml_example_is_understood(body: str, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(body, encoding="utf-8")
    assert parser("fit").parse_args(["fit", "--config", str(path)]).subcommand == "fit"


def test_every_python_example_is_python() -> None:
    assert blocks("python")
    for body in blocks("python"):
        ast.parse(body)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {word for code in lines() | inline() for word in re.findall(r"^make ([a-z-]+)", code)}
    assert {"quickstart", "test"} <= named <= targets


def test_every_file_that_is_named_exists() -> None:
    for code in lines() | inline():
        for name in re.findall(r"(?<![\w/])([\w/]+/[\w/]+\.(?:py|yaml))", code):
            assert any((folder / name).is_file() for folder in (ROOT, ROOT / "src" / "medlit", ROOT / "configs")), name
    for folder in re.findall(r"^\| `([\w/]+/)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_the_path_of_a_note_is_short() -> None:
    body = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The path of a note")[2].partition("\n## ")[0]
    assert 10 < len(re.findall(r"`[\w/]+\.py`", body)) <= 15


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_BLOCK.sub("", page.read_text("utf-8"))):
        if link.startswith("https://"):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_page_is_current(generator: ModuleType) -> None:
    assert generator.PAGE.read_text("utf-8") == generator.page(), "run 'make docs'"


def test_every_setting_that_is_named_exists(generator: ModuleType) -> None:
    known = re.findall(r"^\| `([\w.]+)` \|", generator.PAGE.read_text("utf-8"), re.MULTILINE)
    for code in inline():
        for name in re.findall(r"^(?:--)?((?:data|model|trainer|checkpoint|early_stopping)\.[\w.]+)", code):
            assert any(f"{setting}.".startswith(f"{name}.") for setting in known), name


@pytest.mark.parametrize("flags", sorted(code for code in inline() if re.match(r"--\w+\.[\w.]+[ =]", code)))
def test_every_flag_within_a_sentence_is_understood(flags: str) -> None:
    assert parser("fit").parse_args(["fit", *shlex.split(flags)]).subcommand == "fit"


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 130


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__


def test_the_changelog_lists_every_renamed_setting() -> None:
    rows = re.findall(
        r"^\| `(?:--)?([\w.]+)` \| `(?:--)?([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert RENAMED.items() <= set(rows)


def test_pre_commit_runs_what_make_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint", "make types"]
