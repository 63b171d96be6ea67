"""Fixtures of the tests of `medlit export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlit.tools.export import reload_worker, verify


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload an export in this process: a fresh one takes ten seconds to start."""

    def run_worker(request: dict[str, Any]) -> dict[str, Any]:
        assert request["loader"] != "quantise"
        return json.loads(json.dumps(reload_worker.answer(json.loads(json.dumps(request)))))

    monkeypatch.setattr(verify, "run_worker", run_worker)


@pytest.fixture
def tested(run: Path, run_medlit: Any) -> Path:  # noqa: ANN401 - a callable of conftest's
    """A run that was tested too."""
    config = ["--config", run / "config_fit.yaml", "--run_dir", run]
    assert run_medlit("test", *config, "--ckpt_path", "best").code == 0
    return run
