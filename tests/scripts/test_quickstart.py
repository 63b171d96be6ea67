"""`make quickstart` outside the project's folder; the whole of it trains real weights."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from quickstart import CONFIG, ZERO_SHOT, main

from medlit.cli.arguments import parse_settings

ROOT = Path(__file__).parents[2]


def test_its_configs_exist() -> None:
    assert all((ROOT / path).is_file() for path in (CONFIG[1], ZERO_SHOT[1]))


def test_another_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "run the quickstart in the project's folder" in capsys.readouterr().out


def test_each_step_says_what_it_does_and_how_long_and_the_end_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(arguments: list[str]) -> SimpleNamespace:
        commands.append(arguments)
        return SimpleNamespace(run_folder=Path("logs/quickstart/version_0"))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("quickstart.import_unsloth", lambda: None)
    monkeypatch.setattr("medlit.cli.cli.main", run)
    monkeypatch.setattr("medlit.tools.baseline.run", commands.append)
    monkeypatch.setattr("medlit.report.systems.systems", lambda folder: [])
    main()
    assert [command[0] for command in commands] == ["test", "fit", "test", "predict", "--run_dir"]
    shown = capsys.readouterr().out.splitlines()
    for number in range(1, 6):
        (place,) = (i for i, line in enumerate(shown) if line.startswith(f"{number}/5  "))
        assert re.search(r"; (.* minutes? on two CPU cores; )?seconds", shown[place + 1])
    end = "\n".join(shown).partition("Next:\n")[2]
    for path in ("logs/quickstart/version_0/report.html", "docs/data.md", "docs/hardware.md"):
        assert path in end
    own, larger = (
        end[end.index(f"\n  {step}. ") :].partition("\n  3. " if step == 2 else "\nThe ")[0] for step in (2, 3)
    )
    assert "GPU of 8 GB" in larger
    flags = " ".join(re.findall(r"--data\.columns\.\w+ [A-Z]+", own))
    fit = own[own.index("medlit fit ") :].partition("(")[0].replace("\\\n", " ")
    settings = parse_settings("fit", shlex.split(f"{fit} {flags}")[2:])
    assert str(settings.run_dir) == "logs/my-notes", "the runs of the quickstart's notes stay apart"
    assert (settings.data.columns.text, settings.data.columns.label) == ("NOTE", "SPECIALTY")
    for line in re.findall(r"medlit (?:audit|fit|doctor) .*", end):
        assert (ROOT / line.split("--config ")[-1].split()[0]).is_file() == ("--config" in line)
