"""What a run can do without costs one warning when it fails; lines on standard error."""

from __future__ import annotations

import io
import re
import sys
import time
import warnings

import pytest
from fakes import AtOnce, Terminal
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only

from medlit import errors
from medlit.errors import best_effort, is_first_process, report_if_slow, tell


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "WARNED", set())


def test_a_failure_is_one_warning_however_often_it_happens() -> None:
    @best_effort("its picture")
    def draw(size: int) -> None:
        raise ValueError(f"{size} inches")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(3):
            draw(size)
    (warning,) = caught
    assert str(warning.message).startswith(
        "medlit continues without its picture: 0 inches (ValueError in test_errors.py:"
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_is_no_failure(stop: type[BaseException]) -> None:
    with pytest.raises(stop), best_effort("its picture"):
        raise stop


def test_a_test_sees_the_failure() -> None:
    for _ in range(2):
        with pytest.raises(UserWarning, match="medlit continues without its picture"), best_effort("its picture"):
            raise ValueError


@pytest.mark.parametrize(("rank", "line"), [(0, "medlit: training on 8 notes\n"), (1, "")])
def test_a_line_comes_from_the_first_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, line: str
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    tell("training on 8 notes")
    assert capsys.readouterr() == ("", line)


def test_a_line_is_printed_above_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Tqdm(desc="Epoch 0", total=8):
        tell("training on 8 notes")
    assert "medlit: training on 8 notes\n" in re.split(r"\r| {9,}", capsys.readouterr().err)


def test_a_stage_is_reported_once_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "SLOW", 0.2)
    with report_if_slow("reading notes"):
        pass
    with report_if_slow("tokenising 8 notes"):
        time.sleep(0.6)
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "medlit: tokenising 8 notes\n")


@pytest.mark.parametrize(
    ("stream", "has_bar", "line"), [(io.StringIO, True, 1), (Terminal, True, 0), (Terminal, False, 1)]
)
def test_on_a_terminal_a_stage_with_a_bar_has_no_line(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], has_bar: bool, line: int
) -> None:
    monkeypatch.setattr(errors, "Timer", AtOnce)
    monkeypatch.setattr(sys, "stderr", stream())
    with report_if_slow("tokenising 8 notes", has_bar=has_bar):
        assert sys.stderr.getvalue() == "medlit: tokenising 8 notes\n" * line  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_launcher_numbers_the_processes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for known in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(known, raising=False)
    assert is_first_process()
    monkeypatch.setenv(name, "1")
    assert not is_first_process()
