"""`medlit doctor`: every fault has a row with a cure, a failure has an exit code, and no secret is printed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from medlit.tools import doctor
from medlit.tools.doctor import installed, machine, probe
from medlit.tools.doctor.row import Row

CPU = {
    "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": []},
    "bitsandbytes": {"version": "0.50.2"},
    "unsloth": {"version": "2026.10.9"},
}
CUDA = {"version": "2.11.0+cu130", "cuda": "13.0", "gpus": []}
SECRET = "hf_thisisnotarealtokenatall"


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU machine where everything imports, with a cache and a home of its own."""
    monkeypatch.setattr(doctor, "gather", lambda: CPU)
    monkeypatch.setattr(machine, "_ask", lambda *command: "")
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def rows_of(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Row]]:
    code = doctor.run(["--json"])
    return code, {row["check"]: Row(**row) for row in json.loads(capsys.readouterr().out)}


def test_a_cpu_machine_can_run_and_is_warned_of_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(capsys)
    assert code == 0
    assert [row.check for row in rows.values() if row.status != "ok"] == ["GPU"]
    assert all(row.cure for row in rows.values() if row.status != "ok")


def test_the_table_ends_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.run([]) == 0
    assert capsys.readouterr().out.strip().endswith("medlit can run here.")
    monkeypatch.setattr(doctor, "gather", lambda: CPU | {"unsloth": {"error": "ImportError: no [such] thing"}})
    assert doctor.run([]) == 1
    assert capsys.readouterr().out.strip().endswith("medlit cannot run here: unsloth.")


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

    def child(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{json.dumps(CPU)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", child)
    assert doctor.gather() == CPU
    assert SECRET not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_lightning_fails_and_names_the_advisory(
    name: str, version: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = installed.version_of
    monkeypatch.setattr(installed, "version_of", lambda package: version if package == name else real(package))
    code, rows = rows_of(capsys)
    assert code == 1
    assert rows[name].status == "fail"
    assert "GHSA-w37p-236h-pfx3" in rows[name].cure


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
    real = installed.version_of
    monkeypatch.setattr(installed, "version_of", lambda package: version if package == name else real(package))
    code, rows = rows_of(capsys)
    assert (code, rows[name].status) == (int(status == "fail"), status)


def test_bounds_are_read_from_the_sources_when_medlit_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = installed._bounds()
    monkeypatch.setattr(installed, "version_of", lambda package: "")
    assert installed._bounds() == expected
    assert "lightning" in expected
    assert "pytest" not in expected


@pytest.mark.parametrize(
    ("torch", "driver", "status", "words"),
    [
        (CUDA | {"gpus": [{"name": "T4", "gib": 15.6, "bf16": False}]}, "580.1", "ok", "no bf16"),
        (CUDA | {"gpus": [{"name": "H200", "gib": 139.8, "bf16": True}]}, "580.1", "ok", "139.8 GiB, bf16"),
        (CUDA, "470.1", "warn", "update the NVIDIA driver"),
        (CPU["torch"], "580.1", "warn", "BUILD=gpu"),
        (CPU["torch"], "", "warn", "runs on the CPU"),
    ],
)
def test_the_gpu_row_tells_a_missing_gpu_from_an_unused_one(
    torch: dict[str, object], driver: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ask", lambda *command: driver)
    (row,) = machine.gpus({"torch": torch})
    assert row.status == status
    assert words in f"{row.found} {row.cure}"


def test_torchvision_beside_a_cpu_torch_is_the_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = CPU | {"unsloth": {"error": "RuntimeError: operator torchvision::nms does not exist"}}
    monkeypatch.setattr(machine, "version_of", lambda package: "0.28.0")
    assert "uninstall torchvision" in machine.imported("unsloth", facts).cure
    monkeypatch.setattr(machine, "version_of", lambda package: "")
    assert "requirements/cpu.txt" in machine.imported("unsloth", facts).cure
    assert "requirements/gpu.txt" in machine.imported("unsloth", facts | {"torch": CUDA}).cure


def test_a_probe_that_dies_half_way_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(
            command, -11, stdout=json.dumps({"torch": CUDA}) + "\n", stderr="loading\nSegmentation fault\n"
        ),
    )
    facts = doctor.gather()
    assert machine.torch(facts).status == "ok"
    row = machine.imported("bitsandbytes", facts)
    assert row.status == "fail"
    assert "-11" in row.found
    assert "Segmentation fault" in row.found


def test_a_probe_that_hangs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert machine.torch(doctor.gather()).status == "fail"


def test_the_probe_answers_in_lines_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, str]:
        print("a library that greets")
        raise OSError("libcudart.so.13:\n cannot open")

    monkeypatch.setattr(probe, "_bitsandbytes", broken)
    monkeypatch.setattr(probe, "_unsloth", lambda: {"version": "2026.10.9"})
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main() points it elsewhere
    probe.main()
    torch, bitsandbytes, unsloth = map(json.loads, capsys.readouterr().out.splitlines())
    assert torch["torch"]["version"]
    assert bitsandbytes == {"bitsandbytes": {"error": "OSError: libcudart.so.13: cannot open"}}
    assert unsloth == {"unsloth": {"version": "2026.10.9"}}


def test_an_unusable_cache_fails_and_a_full_disk_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 99, 2**30))
    assert rows_of(capsys)[1]["cache"].status == "warn"
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("MEDLIT_CACHE", str(blocked))
    code, rows = rows_of(capsys)
    assert (code, rows["cache"].status) == (1, "fail")
    assert "MEDLIT_CACHE" in rows["cache"].cure


def test_offline_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(capsys)[1]["Hugging Face Hub"].found == "online"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in rows_of(capsys)[1]["Hugging Face Hub"].found


def test_help_and_unknown_flags_leave_by_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        doctor.run(["--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        doctor.run(["--nonsense"])
