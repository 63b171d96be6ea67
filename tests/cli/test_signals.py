"""Ctrl-C and SIGTERM end any command, at any moment, with one line and exit code 130 or 143."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import environment, exit_code_of

from medlit.atomic_io import atomic_write

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stopped(program: Sequence[object], number: int, seconds: float, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program and send it a signal, once it handles signals and so many seconds have passed."""
    child = subprocess.Popen(
        list(map(str, [sys.executable, *program])),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    )
    status, bit = Path(f"/proc/{child.pid}/status"), 1 << (signal.SIGTERM - 1)
    while child.poll() is None and not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & bit:
        time.sleep(0.01)
    time.sleep(seconds)
    child.send_signal(number)
    out, err = child.communicate(timeout=100)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def check(done: subprocess.CompletedProcess[str], number: int) -> None:
    """A command that was stopped says so in one line; one that had ended before has done its work."""
    assert "Traceback" not in done.stderr, done.stderr
    assert "ignored" not in done.stderr, done.stderr
    if done.returncode in (0, 2, 3):
        return
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines()[-1] == f"medlit: stopped by {signal.Signals(number).name}."


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_imports_is_one_line(tmp_path: Path, number: int) -> None:
    done = stopped(["-m", "medlit", "audit", "--data.source", "builtin"], number, 0.2, tmp_path)
    assert done.returncode == 128 + number
    assert (done.stdout, done.stderr) == ("", f"medlit: stopped by {signal.Signals(number).name}.\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_destructor_or_a_bare_except_does_not_ignore_it(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    def work() -> None:
        with atomic_write(tmp_path / "half.json"):
            try:
                Swallows()
            except:  # noqa: E722
                pass

    assert exit_code_of(work) == 128 + number
    assert capfd.readouterr().err == f"medlit: stopped by {signal.Signals(number).name}.\n"
    assert not list(tmp_path.iterdir())


def test_other_processes_of_a_command_end_with_it(tmp_path: Path) -> None:
    def work() -> None:
        child = subprocess.Popen(["sleep", "100"])
        (tmp_path / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGTERM)

    assert exit_code_of(work) == 143
    end = time.monotonic() + 5
    while time.monotonic() < end and Path(f"/proc/{(tmp_path / 'child').read_text()}/cwd").exists():
        time.sleep(0.05)
    with pytest.raises(OSError, match="No such"):
        os.readlink(f"/proc/{(tmp_path / 'child').read_text()}/cwd")


def test_a_fork_of_a_command_neither_reports_nor_removes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with atomic_write(tmp_path / "whole.json") as beside:
            beside.touch()
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        os._exit(0)

    assert exit_code_of(work) == 0
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(7)

    assert exit_code_of(work, sigint=signal.SIG_IGN) == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "verb", ["--help", "fit --help", "fit", "test", "predict", "audit", "doctor", "baseline", "export"]
)
def test_a_signal_at_any_moment_is_one_line(
    run: Path, tiny_config: Path, tmp_path: Path, verb: str, number: int
) -> None:
    flags = {
        "fit": ["--config", tiny_config],
        "test": ["--config", tiny_config, "--ckpt_path", "best"],
        "predict": ["--config", tiny_config, "--ckpt_path", "best", "--overwrite"],
        "audit": ["--config", tiny_config],
        "doctor": ["--config", tiny_config],
        "baseline": ["--config", tiny_config],
        "export": ["--to", "merged", "--run_dir", run, "--output", "exported"],
    }
    chosen = random.Random(f"{verb} {number}")
    for _ in range(4):
        done = stopped(["-m", "medlit", *verb.split(), *flags.get(verb, [])], number, chosen.uniform(0, 8), tmp_path)
        if " after step " in done.stderr or "--resume continues" in done.stderr:  # while it trained or answered
            assert done.returncode == 128 + number
            assert "Traceback" not in done.stderr
        else:
            check(done, number)
