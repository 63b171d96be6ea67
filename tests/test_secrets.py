"""Nothing leaks: no access token and no note in files or output of a run, and no network connection."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from fakes import notes, write_csv

from medlit.__main__ import main as medlit_main
from medlit.model.module import SpecialtyClassifier

if TYPE_CHECKING:
    from conftest import Medlit

TOKEN = "hf_CanaryTokenCanaryTokenCanaryTok"
NAME = "Zebulon Quackenbush"
# In UTF-8, in UTF-16, and a single word of each.
CANARIES = (TOKEN.encode(), NAME.encode(), NAME.encode("utf-16-le"), b"Quackenbush", b"CanaryToken")


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The forty notes, each with a patient's name."""
    folder = tmp_path / "source"
    folder.mkdir()
    for split, rows in notes().items():
        named = [row | {"transcription": f"{NAME}. {row['transcription']}"} for row in rows]
        write_csv(folder / f"{split}.csv", named)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def hits(place: Path, *texts: str) -> list[str]:
    """Files, and texts by number, that contain a canary."""
    content = {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    content |= {f"text {i}": text.encode() for i, text in enumerate(texts)}
    found = [name for name, value in content.items() if any(canary in value for canary in CANARIES)]
    return found + [name for name in content if any(canary.decode("latin-1") in name for canary in CANARIES)]


def run(
    run_medlit: Medlit, verb: str, config: Path, source: Path, *arguments: object, code: int = 0
) -> tuple[str, str]:
    outcome = run_medlit(verb, "--config", config, "--data.source", source, *arguments)
    assert outcome.code == code, outcome.err
    return outcome.out, outcome.err


def tool(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        medlit_main([str(argument) for argument in arguments])
    assert arguments[0] == "doctor" or stop.value.code == 0
    out, err = capsys.readouterr()
    return out, err


def test_canaries_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"... {NAME} ...")
    (tmp_path / "b").write_text(json.dumps({"token": TOKEN}))
    torch.save({"text": NAME}, tmp_path / "c")
    (tmp_path / "d").write_text("nothing")
    assert [Path(name).name for name in sorted(hits(tmp_path))] == ["a", "b", "c"]
    assert hits(tmp_path / "none", "fine", f"bad: {TOKEN}") == ["text 1"]


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("training_step", RuntimeError),
        ("validation_step", ValueError),
        ("on_before_optimizer_step", KeyError),
        ("training_step", torch.OutOfMemoryError),
    ],
)
def test_a_crash_shows_the_code_and_not_the_notes(
    run_medlit: Medlit,
    tiny_config: Path,
    source: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    error: type[Exception],
) -> None:
    step = getattr(SpecialtyClassifier, method)

    def crash(self: SpecialtyClassifier, *arguments: Any) -> object:  # noqa: ANN401
        text = self.tokenizer.decode(getattr(arguments[0], "input_ids", torch.zeros(1, 1, dtype=int))[0])
        if self.global_step == 4:
            raise error(f"a bug met {len(text)} characters")
        return step(self, *arguments)

    monkeypatch.setattr(SpecialtyClassifier, method, crash)
    try:
        printed = [*run_medlit("fit", "--config", tiny_config, "--data.source", source)]
    except error:
        sys.excepthook(*sys.exc_info())  # as the interpreter would
        printed = [*capsys.readouterr()]
        assert "a bug met" in printed[1]
    assert (work / "logs" / "tiny").exists()
    assert hits(work, *map(str, printed)) == []


def test_a_nonfinite_loss_names_ids_only(
    run_medlit: Medlit, tiny_config: Path, source: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SpecialtyClassifier.training_step
    monkeypatch.setattr(SpecialtyClassifier, "training_step", lambda *arguments: step(*arguments) * float("nan"))
    printed = run(run_medlit, "fit", tiny_config, source, code=2)
    assert "train-" in printed[1]
    assert hits(work, *printed) == []


def test_run_folders_are_private(fitted: Path) -> None:
    assert stat.S_IMODE(fitted.stat().st_mode) == 0o700
    for name in ("best.ckpt", "last.ckpt"):
        assert stat.S_IMODE((fitted / "checkpoints" / name).stat().st_mode) == 0o600


def test_an_existing_run_folder_keeps_its_mode(run_medlit: Medlit, tiny_config: Path, work: Path) -> None:
    folder = work / "shared"
    folder.mkdir()
    folder.chmod(0o750)
    assert run_medlit("fit", "--config", tiny_config, "--run_dir", folder, "--trainer.max_steps", "1").code == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name lookups and connections fail and are recorded here."""
    attempts: list[str] = []

    def refuse(*arguments: object, **_: object) -> NoReturn:
        attempts.append(repr(arguments[-1] if len(arguments) > 1 else arguments))
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return attempts


def test_the_guard_sees_a_connection(guarded: list[str]) -> None:
    import urllib.request

    with pytest.raises(OSError, match="no network here"):
        urllib.request.urlopen("http://127.0.0.1:1")
    assert guarded


def test_no_command_leaks_a_note_or_the_token_or_opens_a_connection_offline(
    run_medlit: Medlit,
    tiny_config: Path,
    source: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    guarded: list[str],
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    printed = []
    for verb in ("fit", "validate", "test", "predict"):
        more = ["--trainer.max_steps", 4] if verb == "fit" else ["--ckpt_path", "last"]
        printed += run(run_medlit, verb, tiny_config, source, *more)
    printed += tool(capsys, "audit", "--config", tiny_config, "--data.source", source, "--output", work / "audit")
    run_folder = work / "logs" / "tiny" / "version_0"
    printed += tool(capsys, "baseline", "--config", tiny_config, "--data.source", source, "--run_dir", run_folder)
    adapter = ["--model.adapter", run_folder / "adapter", "--run_dir", work / "other"]
    printed += run(run_medlit, "test", tiny_config, source, *adapter)
    printed += run(run_medlit, "predict", tiny_config, source, "--data.predict.text", "a heart murmur")
    printed += run(run_medlit, "fit", tiny_config, Path("nobody/nothing"), code=2)
    printed += run(
        run_medlit, "fit", tiny_config, source, "--model.language_model.base_model", "nobody/no-llama", code=2
    )
    printed += run(run_medlit, "test", tiny_config, source, "--model.adapter", "nobody/no-adapter", code=2)
    printed.append(caplog.text)
    names = {path.name for path in work.rglob("*")}
    assert {
        "last.ckpt",
        "config_fit.yaml",
        "hparams.yaml",
        "predictions.csv",
        "audit.json",
        "adapter",
        "report.md",
    } <= names
    assert hits(work, *printed) == []
    assert guarded == []


def test_the_doctor_leaks_nothing_and_opens_no_connection(
    capsys: pytest.CaptureFixture[str], work: Path, guarded: list[str]
) -> None:
    out, err = tool(capsys, "doctor", "--json")
    assert "HF_TOKEN" in out
    assert hits(work, out, err) == []
    assert guarded == []


def test_statistics_stay_off() -> None:
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
