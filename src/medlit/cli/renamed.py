"""Settings of earlier releases: an old name in a config, a flag or a variable is an error that gives the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError

# Old name -> new name. A name stands for the settings below it too: model.backbone for model.backbone.dtype.
RENAMED = {
    "run": "run_dir",
    "model.backbone": "model.language_model",
    "data.text_column": "data.columns.text",
    "data.label_column": "data.columns.label",
    "data.id_column": "data.columns.id",
    "data.split_shares": "data.split.shares",
    "data.split_seed": "data.split.seed",
    "data.folds": "data.split.folds",
    "data.fold": "data.split.fold",
    "data.near_threshold": "data.split.near_threshold",
    "data.conflicts": "data.label_conflicts",
    "data.balance": "data.batching.class_balance",
    "data.examples_per_step": "data.batching.global_batch_size",
    "data.batch_size": "data.batching.micro_batch_size",
    "data.packing": "data.batching.packing",
    "data.eval_batch_size": "data.batching.eval_batch_size",
    "data.token_budget": "data.batching.token_budget",
    "data.num_workers": "data.batching.num_workers",
    "data.seed": "data.batching.seed",
    "data.response_tokens": "data.max_response_tokens",
    "data.text": "data.predict.text",
    "data.predict_source": "data.predict.source",
}
# Old name -> what to do instead.
REMOVED = {
    "data.loss_on": "replaced by data.mask_prompt: true for 'response', false for 'whole'",
    "data.keep": "removed, since keeping a note's end did not improve accuracy; leave it out",
    "model.optimizer.loraplus_ratio": "removed, since LoRA+ did not improve accuracy; leave it out",
    "model.decoding.length_normalise": "removed, since the mean per token did not improve accuracy; leave it out",
    "model.decoding.content_free": "removed, since contextual calibration did not improve accuracy; leave it out",
}
# (Name, old value) -> what to do instead.
OLD_VALUES: dict[tuple[str, str | bool], str] = {
    ("data.split", "auto"): "now a group of settings; set data.split.kind to auto",
    ("data.split", "official"): "now a group of settings; set data.split.kind to official",
    ("data.split", "official_clean"): "now a group of settings; set data.split.kind to official_clean",
    ("data.split", "grouped"): "now a group of settings; set data.split.kind to grouped",
    ("data.split", "kfold"): "now a group of settings; set data.split.kind to kfold",
    ("model.adapter", "none"): "'none' is no longer a value; set model.lora to null for the bare base model",
    # YAML reads a bare off as false.
    ("model.language_model.gradient_checkpointing", "off"): "'off' is now 'none'",
    ("model.language_model.gradient_checkpointing", False): "'off' is now 'none'",
}


def advice(name: str, value: object) -> str | None:
    """What to write instead of a setting, or None if it is not an old one."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            renamed = new + name.removeprefix(old)
            also = advice(renamed, value)
            return f"renamed to {renamed}" + (f", where {also}" if also else "")
    return REMOVED.get(name) or (OLD_VALUES.get((name, value)) if isinstance(value, str | bool) else None)


def check_renamed(args: Sequence[str], env_prefix: str) -> None:
    """Check that no flag, config or environment variable uses a setting of an earlier release.

    Args:
        args: the command line after the verb.
        env_prefix: of the verb's environment variables, such as 'MEDLIT_FIT__'.

    Raises:
        UserError: naming each old setting and its replacement.
    """
    for where, settings in _given(args, env_prefix):
        found = {name: text for name, value in settings.items() if (text := advice(name, value))}
        if found:
            raise UserError("; ".join(f"{name}: {text}" for name, text in found.items()) + f" ({where}).")


def _given(args: Sequence[str], env_prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where settings are given, and name -> value there; whether they exist is for the parser to say."""
    for variable, value in os.environ.items():
        if variable.startswith(env_prefix):
            name = variable.removeprefix(env_prefix).replace("__", ".").lower()
            yield f"environment variable {variable}", {name: value}
    for argument, following in zip_longest(args, args[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag in ("-c", "--config") and Path(value).is_file():
            yield value, _flat("", _load(Path(value)))
        elif flag.startswith("--"):
            yield f"flag {flag}", {flag[2:]: value}


def _load(path: Path) -> Any:  # noqa: ANN401 - any YAML value
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return None  # the parser reports it


def _flat(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(f"{name}.{key}" if name else str(key), below) for key, below in value.items()]
    return {key: leaf for settings in inner for key, leaf in settings.items()}
