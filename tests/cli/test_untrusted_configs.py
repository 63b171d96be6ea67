"""A config from a stranger runs no code: it names classes only where the trainer takes one, and is plain YAML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Medlit


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"class_path": "os.system", "init_args": {"command": "touch sprung"}}},
        {"data": {"class_path": "medlit.data.datamodule.TranscriptionDataModule"}},
        {"model": {"language_model": {"class_path": "subprocess.Popen", "init_args": {"args": "touch sprung"}}}},
        {"trainer": {"callbacks": [{"class_path": "os.system", "init_args": {"command": "touch sprung"}}]}},
        {"trainer": {"logger": {"class_path": "subprocess.Popen", "init_args": {"args": "touch sprung"}}}},
        {"trainer": {"strategy": {"class_path": "builtins.eval", "init_args": {"source": "1"}}}},
        {"checkpoint": {"class_path": "pathlib.Path"}},
        "!!python/object/apply:os.system ['touch sprung']",
        "a: !!python/name:os.system ''",
    ],
    ids=str,
)
def test_a_config_is_plain_yaml_and_names_no_class_but_where_the_trainer_takes_one(
    run_medlit: Medlit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any] | str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stranger.yaml").write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    outcome = run_medlit("fit", "--config", "stranger.yaml")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["stranger.yaml"]


def test_a_flag_of_that_name_is_unknown(run_medlit: Medlit) -> None:
    assert run_medlit("fit", "--model.language_model.trust_remote_code", "true").code == 2
