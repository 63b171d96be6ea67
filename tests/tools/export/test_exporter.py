"""An export is complete and verified, or leaves nothing."""

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

from medlit.cli import tool_parser
from medlit.errors import UserError
from medlit.tools.export import formats, reload_worker, verify
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


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_changed", "2"], "max_changed: must be a share"),
        (["--max_drift", "0"], "max_drift: must be over 0"),
        (["--notes", "0"], "notes: must be at least 1"),
        (["--gguf_types", "q3"], "gguf_types: q3 is not"),
        (["--push"], "push: removed, since .* 'hf upload OWNER/NAME FOLDER' does it"),
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


@pytest.mark.parametrize("flags", [["--config", "c.yaml"], ["--config=c.yaml"], ["-c", "c.yaml"], ["-cc.yaml"]])
def test_a_config_stands_for_the_settings_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("seed_everything: 5\n")
    monkeypatch.setattr("medlit.tools.export.exporter.recorded_settings", lambda *_: pytest.fail("they were read"))

    def stop(config: Any, *_: object) -> None:  # noqa: ANN401
        raise UserError(f"seed {config.seed_everything}")

    monkeypatch.setattr("medlit.tools.export.exporter.find_weights", stop)
    with pytest.raises(UserError, match=r"^seed 5$"):
        export(["--to", "merged", "--output", "x", "--run_dir", str(run), *flags])


def test_the_target_hub_is_refused_with_the_command_that_uploads() -> None:
    with pytest.raises(UserError, match="not 'hub'; for the Hub use 'hf upload'"):
        export(["--to", "hub", "--repo", "owner/name", "--output", "x"])


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


@pytest.mark.usefixtures("in_process")
def test_an_empty_folder_is_filled_through_a_link(run: Path) -> None:
    output = run.parents[2] / "export"
    (target := run.parents[2] / "elsewhere").mkdir()
    output.symlink_to(target)
    assert exported(run, "adapter").is_symlink()
    assert files(target) >= {"README.md", "verification.json"}
    assert left(run) == {"export", "elsewhere"}


def test_help_names_the_bounds_that_hold() -> None:
    text = " ".join(tool_parser("export").format_help().split())
    bounds = f"{verify.MAX_DRIFT:g}" + "".join(f"; for {name} {nats:g}" for name, nats in verify.MAX_DRIFT_OF.items())
    for expected in (f"less than {verify.MAX_DRIFT:g} nats", f"(default: {bounds})", "were not 4-bit"):
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
