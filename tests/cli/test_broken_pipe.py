"""A command whose output is no longer read, as by `head`, ends without a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from medlit.__main__ import main


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--version"],
        ["audit", "--output", "out"],
        ["baseline", "--print_config"],
        ["fit", "--print_config"],
    ],
    ids=lambda arguments: arguments[0] if arguments else "usage",
)
def test_the_reader_has_gone(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "medlit", *arguments]
    variables = environment() | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=variables)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert all(line.startswith("medlit: ") for line in done.stderr.splitlines()), "slow stages are reported, no more"
    assert (tmp_path / "out" / "audit.json").is_file() == ("--output" in arguments), "files come before the table"


def test_a_reader_of_both_outputs_has_gone(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "medlit", "nonsense"]
    done = subprocess.run(command, stdout=writer, stderr=writer, cwd=tmp_path, env=environment())
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr("medlit.__main__.check_configs", fail)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(ValueError, match=r"^$"):
        main(["audit"])


def test_another_broken_pipe_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("medlit.__main__.check_configs", fail)
    with pytest.raises(BrokenPipeError):
        main(["audit"])
