"""Checks of settings that a type cannot express: Lightning's own settings, and null where a value is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.evaluation.metrics import MONITORS
from medlit.model.module import SpecialtyClassifier

_OVER_0 = "must be over 0, or null, not {value}"
_INTERVAL = "a fit validates by optimizer steps; leave it out and set val_every_steps"
_EVERY_VALIDATION = "the best checkpoint is chosen in every validation; leave it out"
_MODE = "must be 'min' or 'max', not {value!r}"
_MONITOR = f"{{value!r}} is not measured in a validation; choose one of {', '.join(MONITORS)}"


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _null_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


# Setting -> whether a value is allowed, and what to say of any other value.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    # With 0 steps Lightning ends at once, with exit code 0.
    "trainer.max_steps": (
        lambda x: x >= 1 or x == -1,
        "must be at least 1, or -1 for as many as the epochs have, not {value}",
    ),
    "trainer.max_epochs": (_null_or(lambda x: x >= 1 or x == -1), "must be at least 1, or null, not {value}"),
    "trainer.gradient_clip_val": (_null_or(lambda x: 0 < x < math.inf), _OVER_0),
    "trainer.limit_val_batches": (_null_or(lambda x: x > 0), _OVER_0),
    "trainer.limit_test_batches": (_null_or(lambda x: x > 0), _OVER_0),
    "trainer.limit_predict_batches": (_null_or(lambda x: x > 0), _OVER_0),
    # What medlit sets itself.
    "trainer.accumulate_grad_batches": (
        _one_of(1),
        "it follows from data.batching.global_batch_size, data.batching.micro_batch_size and the number of devices;"
        " leave it out and set those",
    ),
    "trainer.overfit_batches": (
        _one_of(0),
        "it would replace the sampler that makes up optimizer steps; use configs/debug/overfit.yaml",
    ),
    "trainer.limit_train_batches": (
        _one_of(None),
        "it would cut optimizer steps in two; leave it out and set trainer.max_steps, or give data.source fewer notes",
    ),
    "trainer.val_check_interval": (_one_of(None), _INTERVAL),
    "trainer.check_val_every_n_epoch": (_one_of(None, 1), _INTERVAL),
    "trainer.enable_checkpointing": (
        _one_of(None, True),
        "the best and the last weights are always kept; leave it out, or set trainer.fast_dev_run to leave no files",
    ),
    "checkpoint.save_top_k": (_one_of(1), "'best' is a single checkpoint; leave it out"),
    "checkpoint.filename": (_one_of("best"), "the best checkpoint is found by its name, best.ckpt; leave it out"),
    "checkpoint.enable_version_counter": (_one_of(False), "a new best checkpoint replaces the old one; leave it out"),
    "checkpoint.save_weights_only": (
        _one_of(False),
        "a checkpoint already holds only the trained weights, and a fit needs the rest to resume; leave it out",
    ),
    "checkpoint.dirpath": (_one_of(None), "checkpoints belong in their run folder; leave it out and set run_dir"),
    "checkpoint.every_n_train_steps": (_one_of(None), _EVERY_VALIDATION),
    "checkpoint.every_n_epochs": (_one_of(None), _EVERY_VALIDATION),
    "checkpoint.train_time_interval": (_one_of(None), _EVERY_VALIDATION),
    "checkpoint.mode": (_one_of("min", "max"), _MODE),
    "checkpoint.monitor": (_one_of(*MONITORS), _MONITOR),
    "early_stopping.mode": (_one_of("min", "max"), _MODE),
    "early_stopping.monitor": (_one_of(*MONITORS), _MONITOR),
}


def check_settings(config: Any, fit: bool = False) -> None:  # noqa: ANN401 - jsonargparse's Namespace
    """Check the values that a type does not.

    Args:
        config: the settings of a verb, parsed.
        fit: the verb is fit.

    Raises:
        UserError: naming the setting.
    """
    _check_group("model", SpecialtyClassifier.__init__, config.model)
    _check_group("data", TranscriptionDataModule.__init__, config.data)
    for key in ("val_every_steps", "log_samples", "trainer.max_steps"):
        if config[key] is None:
            raise UserError(f"{key}: must have a value; leave it out for the default.")
    for key, (fits, message) in _CHECKS.items():
        if not fits(config[key]):
            raise UserError(f"{key}: {message.format(value=config[key])}.")
    if config.model.lora is None:
        weights = next((key for key in ("model.adapter", "ckpt_path") if config.get(key) is not None), None)
        if fit:
            raise UserError("model.lora: null is the bare base model, and a fit trains an adapter; leave it out.")
        if weights is not None:
            raise UserError(
                f"model.lora: null is the bare base model, and {weights} names an adapter's weights; leave one of them"
                " out."
            )


def _check_group(group: str, owner: Callable[..., Any], values: Any) -> None:  # noqa: ANN401
    """Check that what a config sets to null may be null; jsonargparse accepts null for every setting of a YAML."""
    if not isinstance(values, Namespace):
        raise UserError(f"{group}: must be a group of settings, not {values!r}; 'medlit fit --help' shows them.")
    for name, hint in get_type_hints(owner).items():
        key = f"{group}.{name}"
        if name not in values or (key == "model.lora" and values[name] is None):
            continue
        if is_dataclass(hint):
            _check_group(key, hint, values[name])  # type: ignore[arg-type]
        elif values[name] is None and type(None) not in get_args(hint):
            raise UserError(f"{key}: must have a value; leave it out for the default.")
