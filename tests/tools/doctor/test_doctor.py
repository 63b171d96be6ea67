"""`medlit doctor`: every fault has a row with a remedy, a failure sets the exit code, and no secret is printed."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import tempfile
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from fake_probe import Child, lines

from medlit.errors import UserError
from medlit.tools import doctor
from medlit.tools.doctor import CheckResult, probe

LIBRARIES = {name: CheckResult(name, "ok", "imports") for name in ("torch", "bitsandbytes", "unsloth")}
SECRET = "hf_thisisnotarealtokenatall"


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU machine where everything imports, with its own cache and home."""
    monkeypatch.setattr(probe, "command_output", lambda *command: "")
    probed(monkeypatch, *LIBRARIES.values())
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def probed(monkeypatch: pytest.MonkeyPatch, *results: CheckResult) -> None:
    """Fake the child process of a machine without a GPU."""
    child = Child(f"noise\n{lines(*results, *probe.gpus([], cuda=''))}")
    monkeypatch.setattr(doctor, "start_probe", lambda arguments: child)


def rows_of(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, CheckResult]]:
    code = doctor.run(["--json"])
    return code, {row["check"]: CheckResult(**row) for row in json.loads(capsys.readouterr().out)}


def test_a_cpu_machine_can_run_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(capsys)
    assert code == 0
    assert [row.check for row in rows.values() if row.status != "ok"] == ["GPU"]
    assert all(row.remedy for row in rows.values() if row.status != "ok")


def test_the_table_ends_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.run([]) == 0
    assert capsys.readouterr().out.strip().split("\n")[-1].startswith("medlit can run here")
    probed(monkeypatch, CheckResult("unsloth", "fail", "ImportError: no [such] thing", "install it"))
    assert doctor.run([]) == 1
    assert capsys.readouterr().out.strip().endswith("medlit cannot run here: unsloth.")


def test_a_terminal_of_80_columns_shows_paths_whole_or_divided_after_a_slash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MEDLIT_CACHE", str(folder := tmp_path / "a-folder-of-the-user" / "and-another" / "cache"))
    remedy = "as configs/hardware/t4_16gb.yaml"
    probed(monkeypatch, CheckResult("unsloth", "warn", "configs/models/smollm2_135m.yaml: base model", remedy))
    assert doctor.run([]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 80 for line in table.splitlines() if line.startswith("│"))
    cells = [line.split("│")[3].strip() for line in table.splitlines() if line.startswith("│")]
    assert "configs/models/smollm2_135m.yaml: base model" in cells
    assert f"Remedy: {remedy}" in cells
    begin = next(i for i, cell in enumerate(cells) if cell and str(folder).startswith(cell))
    parts = [cells[begin]]
    while "cache," not in parts[-1]:
        parts.append(cells[begin + len(parts)])
    assert len(parts) > 1
    assert all(part.endswith("/") for part in parts[:-1])
    assert "".join(parts).startswith(f"{folder},")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_tokens_value_is_never_printed(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    saved = tmp_path / "hub" / "token"
    saved.parent.mkdir()
    saved.write_text(SECRET)
    doctor.run(flags)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert "HF_TOKEN" in printed.out
    assert "saved" in printed.out


def test_the_probing_process_gets_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    seen = {}

    def child(command: list[str], env: dict[str, str], **_: object) -> Child:
        seen.update(env)
        return Child(f"noise\n{lines(LIBRARIES['torch'])}\n")

    monkeypatch.setattr(subprocess, "Popen", child)
    assert doctor.read_probe(doctor.start_probe([])) == [LIBRARIES["torch"]]
    assert SECRET not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("transformers", "5.18.0", "warn"),
        ("datasets", "5.0.0", "warn"),
        ("peft", "0.10.0", "warn"),
        ("trl", "", "fail"),
    ],
)
def test_a_package_out_of_bounds_warns_and_a_missing_one_fails(
    name: str, version: str, status: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda package: version if package == name else real(package))
    code, rows = rows_of(capsys)
    assert (code, rows[name].status) == (int(status == "fail"), status)


def test_requirements_of_extras_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["lightning>=2", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert [row.check for row in doctor.packages()] == ["lightning", "other packages"]


@pytest.mark.parametrize(
    ("devices", "cuda", "driver", "status", "words"),
    [
        ([{"name": "T4", "gib": 15.6, "bf16": False}], "13.0", "580.1", "ok", "t4_16gb.yaml), driver 580.1"),
        ([{"name": "H200", "gib": 139.8, "bf16": True}], "13.0", "580.1", "ok", "12.3 of 139.8 GiB free, bf16"),
        ([], "13.0", "470.1", "warn", "driver is 470.1 update the NVIDIA driver"),
        ([], "", "580.1", "warn", "BUILD=gpu"),
        ([], "", "", "warn", "runs on the CPU"),
    ],
)
def test_a_missing_gpu_differs_from_an_unused_one(
    devices: list[dict], cuda: str, driver: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "command_output", lambda *command: driver)
    (row,) = probe.gpus([device | {"free": 12.3} for device in devices], cuda)
    assert row.status == status
    assert words in f"{row.found} {row.remedy}"


def test_torchvision_beside_a_cpu_torch_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "version_of", lambda package: "0.28.0")
    assert "uninstall torchvision" in probe.library_remedy("unsloth", cuda="")
    assert "requirements/gpu.txt" in probe.library_remedy("unsloth", cuda="13.0")
    monkeypatch.setattr(probe, "version_of", lambda package: "")
    assert "requirements/cpu.txt" in probe.library_remedy("unsloth", cuda="")


@pytest.mark.parametrize(("has_config", "check"), [(False, "libraries"), (True, "trial")])
def test_a_crashed_probe_keeps_its_earlier_results(has_config: bool, check: str) -> None:
    found = list(LIBRARIES.values()) if has_config else [LIBRARIES["torch"]]
    child = Child(lines(*found) + "\n", "loading\nSegmentation fault\n", -11)
    *earlier, crash = doctor.read_probe(child, has_config=has_config)
    assert earlier == found
    assert (crash.check, crash.status) == (check, "fail")
    assert "-11" in crash.found
    assert "Segmentation fault" in crash.found
    assert crash.remedy


def test_a_hanging_probe_fails_and_is_killed() -> None:
    child = Child(hangs=True)
    (row,) = doctor.read_probe(child)
    assert row.status == "fail"
    assert not child.hangs


def test_the_probe_prints_lines_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[CheckResult]:
        print("a library that greets")
        raise OSError("libcudart.so.13:\n cannot open")

    monkeypatch.setitem(probe.LIBRARY_CHECKS, "bitsandbytes", broken)
    monkeypatch.setitem(probe.LIBRARY_CHECKS, "unsloth", lambda: [LIBRARIES["unsloth"]])
    probe.main([])
    rows = [CheckResult(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    names = [row.check for row in rows if not row.check.startswith("GPU")]
    assert names == ["torch", "bitsandbytes", "unsloth"]
    row = {row.check: row for row in rows}
    assert row["torch"].found
    assert row["bitsandbytes"].status == "fail"
    assert row["bitsandbytes"].found == "OSError: libcudart.so.13: cannot open"
    assert row["bitsandbytes"].remedy


@pytest.mark.parametrize("factor", [0, float("nan")])
def test_a_4_bit_layer_without_a_finite_gradient_is_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import Linear4bit

    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: factor * forward(self, x))
    with pytest.raises(ArithmeticError, match="wrong numbers"):
        probe.LIBRARY_CHECKS["bitsandbytes"]()


def test_an_optimizer_that_takes_no_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(AdamW8bit, "step", lambda self: None)
    with pytest.raises(ArithmeticError, match="wrong numbers"):
        probe.LIBRARY_CHECKS["bitsandbytes"]()


def test_4_bit_training_that_does_not_run_fails_with_a_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[CheckResult]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(probe, "LIBRARY_CHECKS", {"bitsandbytes": broken})
    probe.main([])
    row = CheckResult(**json.loads(capsys.readouterr().out))
    assert (row.check, row.status, row.found) == ("bitsandbytes", "fail", "RuntimeError: no kernel image")
    assert "python -m bitsandbytes" in row.remedy
    probed(monkeypatch, row)
    assert rows_of(capsys)[0] == 1


def test_triton_needs_a_c_compiler_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    row = probe.triton()
    assert row.status == "warn"
    assert "no C compiler" in row.found
    assert "build-essential" in row.remedy


def test_an_unusable_cache_fails_and_a_full_disk_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 99, 2**30))
    _, rows = rows_of(capsys)
    assert (rows["cache"].status, rows["Hub cache"].status) == ("warn", "warn")
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("MEDLIT_CACHE", str(blocked))
    code, rows = rows_of(capsys)
    assert (code, rows["cache"].status) == (1, "fail")
    assert "MEDLIT_CACHE" in rows["cache"].remedy


def test_the_hub_cache_is_that_of_the_hub_libraries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert rows_of(capsys)[1]["Hub cache"].found.startswith(f"{tmp_path}/hub/hub, ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "weights"))
    assert rows_of(capsys)[1]["Hub cache"].found.startswith(f"{tmp_path}/weights, ")


def test_a_read_only_cache_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    code, rows = rows_of(capsys)
    assert (code, rows["cache"].status, rows["Hub cache"].status) == (1, "fail", "fail")
    assert "Read-only" in rows["cache"].found
    assert "HF_HOME" in rows["Hub cache"].remedy
    assert not (tmp_path / "hub").exists(), "the check creates no folder"


def test_bare_sources_are_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    code, rows = rows_of(capsys)
    assert (code, rows["packages"].status) == (0, "warn")


def test_offline_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(capsys)[1]["Hugging Face Hub"].found.startswith("online, not tried")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in rows_of(capsys)[1]["Hugging Face Hub"].found


def test_help_exits_0_and_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        doctor.run(["--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(UserError, match="--nonsense: settings need a --config beside them; see 'medlit doctor"):
        doctor.run(["--nonsense"])
