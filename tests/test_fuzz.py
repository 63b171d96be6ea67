"""Whatever comes in, a user gets a sentence: never a traceback, and never an end that is well with nothing done."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import yaml
from corpus import settings, tables
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI

if TYPE_CHECKING:
    from conftest import Medlit, Outcome

quick = effort(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Accepted(Exception):
    """The settings went through, and the verb would run."""


@pytest.fixture(scope="module")
def built() -> dict[str, object]:
    """The command line's parser, which takes half a second to build."""
    from medlit.cli.cli import main

    kept: dict[str, object] = {}
    setup = LightningCLI.setup_parser

    def keep(self: LightningCLI, *arguments: object, **settings: object) -> None:
        setup(self, *arguments, **settings)  # type: ignore[arg-type]
        kept.update({name: value for name, value in vars(self).items() if "parser" in name or "method" in name})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "setup_parser", keep)
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main(["fit", "--print_config"])
    return kept


@pytest.fixture
def command(
    medlit: Medlit, built: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """`medlit fit` up to where it would read notes and load weights."""

    def accept(*_: object) -> NoReturn:
        raise Accepted

    monkeypatch.setattr(LightningCLI, "setup_parser", lambda self, *_, **__: vars(self).update(built))
    monkeypatch.setattr("medlit.cli.cli.MedlitCLI._run_subcommand", accept)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: medlit("fit", *arguments)


def test_the_corpus_is_large_and_has_no_case_twice() -> None:
    assert len(set(settings())) == len(settings())
    assert len({(suffix, content) for _, suffix, content in tables()}) == len(tables())
    assert len(settings()) + len(tables()) >= 200


def test_good_settings_are_accepted(command: Callable[..., Outcome]) -> None:
    with pytest.raises(Accepted):
        command("--trainer.accelerator", "cpu")


@pytest.mark.parametrize("where", ["config", pytest.param("flag", marks=pytest.mark.slow)])
def test_bad_settings_are_refused(command: Callable[..., Outcome], where: str, tmp_path: Path) -> None:
    wrong = {}
    for key, value in settings():
        if where == "config" and key == "config":
            continue
        arguments = [f"--{key}={value}"]
        if where == "config":
            content: object = _plain(value)
            for part in reversed(key.split(".")):
                content = {part: content}
            (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
            arguments = ["--config", str(tmp_path / "bad.yaml")]
        try:
            outcome = command(*arguments)
        except Exception as error:
            wrong[f"{key}={value}"] = repr(error)
            continue
        if outcome.code != 2 or "Traceback" in outcome.err or not outcome.err.strip():
            wrong[f"{key}={value}"] = f"{outcome.code}: {outcome.err[-200:]}"
    assert not wrong, "\n".join(f"{key}: {why}" for key, why in wrong.items())
    assert [path.name for path in tmp_path.iterdir()] in ([], ["bad.yaml"])


def _plain(value: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


# --- whatever hypothesis thinks of ------------------------------------------------------------------------------------


@quick
@given(text=st.text(max_size=60))
def test_any_config_is_taken_or_refused(command: Callable[..., Outcome], tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(Accepted):
        outcome = command("--config", path, "--trainer.accelerator", "cpu")
        assert outcome.code == 2
        assert "Traceback" not in outcome.err


@quick
@given(arguments=st.lists(st.text(max_size=12).map(lambda text: f"--{text}"), min_size=1, max_size=3))
def test_any_flags_are_taken_or_refused(command: Callable[..., Outcome], arguments: list[str]) -> None:
    with contextlib.suppress(Accepted):
        outcome = command(*arguments)
        assert outcome.code == 2 or "--help" in arguments or "usage" in outcome.out.lower()
