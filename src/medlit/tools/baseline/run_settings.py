"""What run folders have on record: the settings of their test, and its outcome."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError
from medlit.report.systems import MODEL, System, read_system

_SECTIONS = ("seed_everything", "model", "data")
_TRAINER = ("accelerator", "max_steps", "max_epochs", "gradient_clip_val")


def recorded_settings(run: Path) -> list[str]:
    """The settings of a run's test, and of its fit how long it trained, as an argument to lay flags over.

    Raises:
        UserError: the run has no config of a test.
    """
    test, fit = run / "config_test.yaml", run / "config_fit.yaml"
    if not test.is_file():
        raise UserError(f"run: {run} holds no config_test.yaml; run 'medlit test' for it first.")
    config = _read(test)
    values = {name: config[name] for name in _SECTIONS if name in config}
    trainer = _read(fit if fit.is_file() else test).get("trainer", {})
    values["trainer"] = {name: trainer[name] for name in _TRAINER if trainer.get(name) is not None}
    return ["--config", json.dumps(values)]


def system_beside(run: Path) -> System:
    """Another run's test as a system to compare with; the bare base model is called zero-shot.

    Raises:
        UserError: there is no test in that folder.
    """
    config = _read(run / "config_test.yaml") if (run / "config_test.yaml").is_file() else {}
    bare = config.get("model", {}).get("adapter") == "none" and config.get("ckpt_path") is None
    absolute = run.absolute()
    return replace(read_system(run, MODEL), name="zero_shot" if bare else f"{absolute.parent.name}-{absolute.name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"run: {path} is damaged; run the verb that wrote it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"run: {path} is damaged; run the verb that wrote it again.")
    return values
