"""`make quickstart` outside the project's folder; the whole of it trains real weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from quickstart import CONFIG, ZERO_SHOT, main

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
