"""An export is complete and verified, or leaves nothing; the Hub gets only what `--push` sends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import exit_code_of
from exports import exported, files, left, verification

from medlit.errors import UserError
from medlit.tools.export import build_parser, formats, reload_worker, verify
from medlit.tools.export import run as export

# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, w: w + 0.5 * torch.randn_like(w) if name.endswith("1.mlp.up_proj.weight") else w, "max_"),
        (lambda name, w: w * 0.9 if name == "lm_head.weight" else w, "max_"),
        (lambda name, w: w * float("nan") if name.endswith("norm.weight") else w, "finite"),
    ],
    ids=["a layer", "the head", "no numbers"],
)
def test_a_damaged_export_is_refused_and_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, torch.Tensor], torch.Tensor], message: str
) -> None:
    merged_weight = formats.merged_weight

    def damaged(model: torch.nn.Module, name: str, weight: torch.nn.Parameter) -> torch.Tensor:
        return change(name, merged_weight(model, name, weight))

    monkeypatch.setattr(formats, "merged_weight", damaged)
    with pytest.raises(UserError, match=message):
        exported(run, "merged")
    assert left(run) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_ended_by_a_signal_leaves_nothing(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    unfinished = tmp_path_factory.mktemp("ended") / "unfinished"

    def ended(*_: object) -> None:
        unfinished.write_text(" ".join(left(run)))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(formats, "write_merged", ended)
    assert exit_code_of(lambda: exported(run, "merged")) == 128 + number
    assert len(unfinished.read_text().split()) == 2, "it was in the middle of writing"
    assert left(run) == set()


@pytest.mark.usefixtures("in_process")
def test_a_different_tokenizer_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = reload_worker.answer

    def other(request: dict[str, Any]) -> dict[str, Any]:
        result = answer(request)
        return result | {"tokens": [tokens[:-1] for tokens in result["tokens"]]}

    monkeypatch.setattr(reload_worker, "answer", other)
    with pytest.raises(UserError, match="tokenizes text differently"):
        exported(run, "adapter")
    assert left(run) == set()


@pytest.mark.usefixtures("in_process")
def test_a_log_file_gets_the_steps_and_no_progress_bars(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exported(run, "merged")
    err = capfd.readouterr().err
    assert "medlit: " in err
    assert "scoring the labels" in err
    assert "notes/s" not in err


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Client:
    """Stands for `HfApi`; records its calls."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def create_repo(self, name: str, **arguments: object) -> None:
        self.calls.append(("create", {"name": name, **arguments}))

    def upload_folder(self, **arguments: object) -> str:
        if self.fails:
            raise OSError("the connection broke")
        self.calls.append(("upload", arguments))
        return "https://example.org"


def upload(folder: Path | str, client: Client, *flags: str) -> None:
    """Check the flags of an upload and do it."""
    from medlit.tools.export import exporter

    arguments = ["--to", "hub", "--output", str(folder), "--repo", "owner/notes", *flags]
    options = build_parser().parse_args(arguments)
    exporter.upload(options, exporter.check_upload(options), client)  # type: ignore[arg-type]


@pytest.fixture
def adapter_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    """An exported folder, with a token and a network to upload it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("README.md", "adapter_model.safetensors", "medlit.json", "verification.json"):
        (folder / name).write_text(name)
    return folder


def test_a_dry_run_lists_the_files_and_sends_nothing(adapter_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = Client()
    upload(adapter_files, client)
    out = capsys.readouterr().out
    assert client.calls == []
    assert out.splitlines()[1:] == ["  README.md", "  adapter_model.safetensors", "  medlit.json"]
    assert "hf_secret" not in out


@pytest.mark.parametrize(("flags", "private"), [([], True), (["--public"], False)])
def test_a_push_sends_the_adapter_and_its_card(adapter_files: Path, flags: list[str], private: bool) -> None:
    client = Client()
    upload(adapter_files, client, "--push", *flags)
    (_, created), (_, sent) = client.calls
    assert created == {"name": "owner/notes", "private": private, "exist_ok": True}
    assert sent["repo_id"] == "owner/notes"
    assert sent["folder_path"] == str(adapter_files)
    assert sent["allow_patterns"] == ["README.md", "adapter_model.safetensors", "medlit.json"]


def test_a_failed_push_is_reported(adapter_files: Path) -> None:
    with pytest.raises(UserError, match="the connection broke"):
        upload(adapter_files, Client(fails=True), "--push")


def test_a_push_needs_a_token_and_a_network(adapter_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        upload(adapter_files, Client(), "--push")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        upload(adapter_files, Client(), "--push")


def test_a_local_base_model_is_not_for_the_hub(run: Path) -> None:
    with pytest.raises(UserError, match="is a local folder"):
        exported(run, "hub", "--repo", "owner/notes")
    assert left(run) == set()


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_changed", "2"], "max_changed: must be a share"),
        (["--max_drift", "0"], "max_drift: must be over 0"),
        (["--notes", "0"], "notes: must be at least 1"),
        (["--gguf_types", "q3"], "gguf_types: q3 is not"),
        (["--push"], "to: --repo, --push and --public are for --to hub"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file"),
        (["--run_dir", "nowhere"], "run_dir: there is no folder"),
        (["--model.lora.r", "8"], r"model\.lora\.r"),
        (["--data.columns.text", "remarks"], r"data\.columns\.text: .* has no column"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr("medlit.tools.export.source.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        exported(run, "merged", *flags)
    assert left(run) == set()


def test_without_settings_there_is_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="ckpt_path: "):
        export(["--to", "merged", "--output", "x"])


def test_a_folder_that_holds_files_is_left_alone(run: Path) -> None:
    output = run.parents[2] / "export"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output: .* exists and is not empty"):
        exported(run, "merged")
    assert files(output) == {"mine.txt"}


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("to", "output", "ckpt_path", "max_changed", "max_drift", "push"))


def test_help_names_the_bounds_that_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_CHANGED", 0.07), ("MAX_DRIFT", 0.75), ("MAX_DRIFT_OF", {"q2_k": 9.5})):
        monkeypatch.setattr(verify, name, value)
    text = " ".join(build_parser().format_help().split())
    for expected in ("(default: 0.07)", "less than 0.75 nats", "(default: 0.75; for q2_k 9.5)", "were not 4-bit"):
        assert expected in text


# --- fresh processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["adapter", "merged", "gguf"])
def test_a_fresh_process_loads_the_files(run: Path, target: str) -> None:
    """The whole path, as a user takes it."""
    output = run.parents[2] / "export"
    flags = ["--run_dir", str(run), "--to", target, "--output", str(output), "--max_drift", "2", "--max_changed", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "medlit", "export", *flags], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert {row["against_medlit"]["changed"] for row in verification(output)["exports"]} == {0}
    assert left(run) == {"export"}
