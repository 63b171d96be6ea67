"""`medlit doctor`: every fault has a row with a cure, a failure has an exit code, and no secret is printed."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from medlit.tools import doctor
from medlit.tools.doctor import Probed, installed, machine, probe, quantised
from medlit.tools.doctor.check_result import Row

CPU = {
    "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": []},
    "bitsandbytes": {"version": "0.50.2"},
    "4-bit": {"device": "cpu", "forward": 0.09, "backward": 0.09},
    "8-bit AdamW": {"device": "cpu", "moved": 0.01},
    "triton": {"version": None},
    "unsloth": {"version": "2026.10.9"},
}
CUDA = {"version": "2.11.0+cu130", "cuda": "13.0", "gpus": []}
SECRET = "hf_thisisnotarealtokenatall"


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU machine where everything imports, with a cache and a home of its own."""
    probed(monkeypatch, CPU)
    monkeypatch.setattr(machine, "_ask", lambda *command: "")
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


class Child:
    """A process that has ended, or never will."""

    def __init__(self, out: str = "", err: str = "", code: int = 0, *, hangs: bool = False) -> None:
        self.out, self.err, self.returncode, self.hangs = out, err, code, hangs

    def communicate(self, timeout: float | None) -> tuple[str, str]:
        if self.hangs:
            raise subprocess.TimeoutExpired("probe", timeout or 0)
        return self.out, self.err

    def kill(self) -> None:
        self.hangs = False


def probed(monkeypatch: pytest.MonkeyPatch, facts: dict[str, dict], *more: dict) -> None:
    """Let the child have found this, and told more of a config."""
    lines = [json.dumps(finding) for finding in (facts, *more)]
    monkeypatch.setattr(doctor, "start", lambda settings, show_notes: Child("\n".join(["noise", *lines])))


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
    probed(monkeypatch, CPU | {"unsloth": {"error": "ImportError: no [such] thing"}})
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

    def child(command: list[str], env: dict[str, str], **_: object) -> Child:
        seen.update(env)
        return Child(f"noise\n{json.dumps(CPU)}\n")

    monkeypatch.setattr(subprocess, "Popen", child)
    assert doctor.gather(doctor.start([], show_notes=False)) == Probed(CPU)
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


def test_bounds_are_those_of_the_sources_and_else_of_the_installed_medlit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = installed._bounds()
    project = tomllib.loads((installed.CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = [f'{line}; extra == "dev"' for line in project["optional-dependencies"]["dev"]]
    monkeypatch.setattr(installed, "CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: [*project["dependencies"], *optional])
    assert installed._bounds() == expected
    assert "lightning" in expected
    assert "pytest" not in expected


@pytest.mark.parametrize(
    ("torch", "driver", "status", "words"),
    [
        (CUDA | {"gpus": [{"name": "T4", "gib": 15.6, "bf16": False}]}, "580.1", "ok", "no bf16"),
        (
            CUDA | {"gpus": [{"name": "H200", "gib": 139.8, "bf16": True}]},
            "580.1",
            "ok",
            "12.3 of 139.8 GiB free, bf16",
        ),
        (CUDA, "470.1", "warn", "update the NVIDIA driver"),
        (CPU["torch"], "580.1", "warn", "BUILD=gpu"),
        (CPU["torch"], "", "warn", "runs on the CPU"),
    ],
)
def test_the_gpu_row_tells_a_missing_gpu_from_an_unused_one(
    torch: dict[str, object], driver: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ask", lambda *command: driver)
    for gpu in torch["gpus"]:
        gpu["free"] = 12.3
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


def test_a_probe_that_dies_half_way_keeps_what_it_found() -> None:
    child = Child(json.dumps({"torch": CUDA}) + "\n", "loading\nSegmentation fault\n", -11)
    facts = doctor.gather(child).facts
    assert machine.torch(facts).status == "ok"
    for row in (machine.imported("bitsandbytes", facts), machine.quantised(facts), machine.triton(facts)):
        assert row.status == "fail"
        assert "-11" in row.found
        assert "Segmentation fault" in row.found


def test_a_probe_that_hangs_fails_and_is_ended() -> None:
    child = Child(hangs=True)
    assert machine.torch(doctor.gather(child).facts).status == "fail"
    assert not child.hangs


def test_the_probe_answers_in_lines_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, str]:
        print("a library that greets")
        raise OSError("libcudart.so.13:\n cannot open")

    monkeypatch.setattr(probe, "_bitsandbytes", broken)
    monkeypatch.setattr(probe, "_unsloth", lambda: {"version": "2026.10.9"})
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main() points it elsewhere
    probe.main([])
    told: dict[str, dict] = {}
    for line in capsys.readouterr().out.splitlines():
        told |= json.loads(line)
    assert list(told) == ["torch", "bitsandbytes", "4-bit", "8-bit AdamW", "triton", "unsloth"]
    assert told["torch"]["version"]
    assert told["bitsandbytes"] == {"error": "OSError: libcudart.so.13: cannot open"}
    # Really run: a 4-bit layer errs, and by what quantisation explains.
    assert 0.01 < told["4-bit"]["forward"] < 0.2
    assert 0.01 < told["4-bit"]["backward"] < 0.2
    assert told["8-bit AdamW"]["moved"] == pytest.approx(0.01, rel=0.01)


def test_a_4_bit_layer_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(ArithmeticError, match="forward pass is off by"):
        quantised.four_bit(torch.device("cpu"))


def test_an_optimizer_that_steps_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(AdamW8bit, "step", lambda self: None)
    with pytest.raises(ArithmeticError, match="moved the weights by 0 "):
        quantised.optimizer_step(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("4-bit", "4-bit training", "a 4-bit layer: RuntimeError"),
        ("8-bit AdamW", "4-bit training", "8-bit AdamW: RuntimeError"),
        ("triton", "Triton", "RuntimeError"),
    ],
)
def test_what_does_not_run_fails_with_a_cure(
    name: str, check: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probed(monkeypatch, CPU | {name: {"error": "RuntimeError: no kernel image"}})
    code, rows = rows_of(capsys)
    assert (code, rows[check].status) == (1, "fail")
    assert words in rows[check].found
    assert rows[check].cure


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ("", "ok", "none"),
        ("| NVIDIA-SMI 580.9  Driver Version: 580.95.05  CUDA Version: 13.0 |", "ok", "580.95.05, for CUDA up to 13.0"),
        ("| NVIDIA-SMI 595  Driver Version: 595.1  CUDA UMD Version: 13.2 |", "ok", "595.1, for CUDA up to 13.2"),
        ("| NVIDIA-SMI 550  Driver Version: 550.54  CUDA Version: 12.4 |", "warn", "PyTorch is built for CUDA 13.0"),
    ],
)
def test_the_driver_is_compared_with_the_cuda_of_torch(
    said: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ask", lambda *command: said)
    row = machine.driver({"torch": CUDA})
    assert row.status == status
    assert words in row.found


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
    assert "MEDLIT_CACHE" in rows["cache"].cure


def test_the_hub_s_cache_is_looked_for_where_the_hub_s_libraries_have_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert rows_of(capsys)[1]["Hub cache"].found.startswith(f"{tmp_path}/home/hub, ")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "weights"))
    assert rows_of(capsys)[1]["Hub cache"].found.startswith(f"{tmp_path}/weights, ")


def test_a_cache_that_takes_no_file_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    code, rows = rows_of(capsys)
    assert (code, rows["cache"].status, rows["Hub cache"].status) == (1, "fail", "fail")
    assert "Read-only" in rows["cache"].found
    assert "HF_HOME" in rows["Hub cache"].cure
    assert not (tmp_path / "hub").exists(), "what is only looked at is not made"


def test_the_lock_names_what_differs_from_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pins = installed.read_lock(installed.CHECKOUT / "requirements" / "cpu.txt")
    versions = {name: pin for name, pin in pins.items()} | {"torch": f"{pins['torch']}+cpu"}
    monkeypatch.setattr(installed, "version_of", lambda package: versions.get(package, ""))
    assert rows_of(capsys)[1]["lock"] == Row("lock", "ok", f"all {len(pins)} packages as in requirements/cpu.txt")
    versions |= {"peft": "0.21.9", "xxhash": ""}
    code, rows = rows_of(capsys)
    assert (code, rows["lock"].status) == (0, "warn")
    assert rows["lock"].found.startswith(f"2 of {len(pins)} ")
    assert f"peft 0.21.9 (locked: {pins['peft']})" in rows["lock"].found
    assert f"xxhash missing (locked: {pins['xxhash']})" in rows["lock"].found
    monkeypatch.setattr(installed, "CHECKOUT", tmp_path)
    assert "lock" not in rows_of(capsys)[1]


def test_bare_sources_are_no_crash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = installed.version_of
    monkeypatch.setattr(installed, "version_of", lambda package: "" if package == "medlit" else real(package))
    monkeypatch.setattr(installed, "CHECKOUT", tmp_path)
    code, rows = rows_of(capsys)
    assert (code, rows["packages"].status) == (0, "warn")


def test_offline_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(capsys)[1]["Hugging Face Hub"].found.startswith("online")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in rows_of(capsys)[1]["Hugging Face Hub"].found


def test_help_and_unknown_flags_leave_by_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        doctor.run(["--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        doctor.run(["--nonsense"])
