"""What the settings must be beyond their types: numbers within bounds, nothing that medlit sets itself, no gaps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.settings import Batching, Columns, Labels, Predict, Split
from medlit.errors import UserError
from medlit.evaluation.metrics import MONITORS
from medlit.model.settings import Decoding, LanguageModel, Lora, Optimizer

# Settings of which there is at least one.
_COUNTS = (
    "val_every_steps",
    "model.language_model.max_length",
    "model.lora.r",
    "model.decoding.max_new_tokens",
    "data.batching.global_batch_size",
    "data.batching.micro_batch_size",
    "data.batching.eval_batch_size",
    "data.max_response_tokens",
)
# Numbers whose type allows more than makes sense: key -> what it must be, in words and as a test. Null always may be.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "model.language_model.memory_budget_gib": ("more than 0, or null", lambda x: 0 < x < math.inf),
    "model.optimizer.learning_rate": ("over 0", lambda x: 0 < x < math.inf),
    "model.optimizer.weight_decay": ("at least 0", lambda x: 0 <= x < math.inf),
    "model.optimizer.warmup_steps": ("at least 0", lambda x: x >= 0),
    "model.lora.alpha": ("at least 1", lambda x: x >= 1),
    "model.lora.dropout": ("at least 0 and under 1", lambda x: 0 <= x < 1),
    "data.batching.token_budget": ("at least 1, or null", lambda x: x >= 1),
    "data.batching.num_workers": ("at least 0", lambda x: x >= 0),
    "data.batching.seed": ("at least 0", lambda x: x >= 0),
    "data.split.seed": ("at least 0", lambda x: x >= 0),
    # Lightning would end at once, and well.
    "trainer.max_steps": ("at least 1, or -1 for as many as the epochs have", lambda x: x >= 1 or x == -1),
    "trainer.max_epochs": ("at least 1, or null", lambda x: x >= 1 or x == -1),
    "trainer.gradient_clip_val": ("over 0, or null", lambda x: 0 < x < math.inf),
    "trainer.limit_val_batches": ("over 0, or null", lambda x: x > 0),
    "trainer.limit_test_batches": ("over 0, or null", lambda x: x > 0),
    "trainer.limit_predict_batches": ("over 0, or null", lambda x: x > 0),
}

# Settings of Lightning's that medlit makes itself: key -> what may stand there, and why nothing else.
_TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "trainer.accumulate_grad_batches": (
        (1,),
        "it follows from data.batching.global_batch_size, data.batching.micro_batch_size and the number of devices;"
        " leave it out and set those",
    ),
    "trainer.overfit_batches": (
        (0, 0.0),
        "it would take the place of the sampler that deals notes to steps; use configs/debug/overfit.yaml",
    ),
    "trainer.limit_train_batches": (
        (None,),
        "it would cut optimizer steps in two; leave it out and set trainer.max_steps, or give data.source fewer notes",
    ),
    "trainer.val_check_interval": ((None,), "a fit validates by optimizer steps; leave it out and set val_every_steps"),
    "trainer.check_val_every_n_epoch": (
        (None, 1),
        "a fit validates by optimizer steps; leave it out and set val_every_steps",
    ),
    "checkpoint.save_top_k": ((1,), "'best' is one checkpoint, the best; leave it out"),
    "checkpoint.filename": (("best",), "the best checkpoint is found by its name, best.ckpt; leave it out"),
    "checkpoint.enable_version_counter": ((False,), "the best checkpoint takes the last one's place; leave it out"),
    "checkpoint.save_weights_only": (
        (False,),
        "of the model a checkpoint holds its trained weights alone already, and without the rest no fit could go on;"
        " leave it out",
    ),
    "checkpoint.dirpath": ((None,), "checkpoints are found in their run folder; leave it out and set run_dir"),
} | {
    f"checkpoint.{name}": ((None,), "the best checkpoint is chosen in every validation; leave it out")
    for name in ("every_n_train_steps", "every_n_epochs", "train_time_interval")
}

# Groups of settings -> what takes them.
_GROUPS: dict[str, Callable[..., Any]] = {
    "model.language_model": LanguageModel,
    "model.lora": Lora,
    "model.optimizer": Optimizer,
    "model.decoding": Decoding,
    "data": TranscriptionDataModule.__init__,
    "data.columns": Columns,
    "data.labels": Labels,
    "data.split": Split,
    "data.batching": Batching,
    "data.predict": Predict,
}


def check_settings(config: Any) -> None:  # noqa: ANN401 - jsonargparse's Namespace
    """Check the values that a type does not.

    Raises:
        UserError: naming the key.
    """
    for key, kind in _GROUPS.items():
        values = config[key]
        if key == "model.lora" and values is None:
            continue
        if not isinstance(values, Namespace):
            raise UserError(f"{key}: must be a group of settings, not {values!r}; 'medlit fit --help' shows them.")
        # jsonargparse lets a config say null anywhere.
        hints = get_type_hints(kind)
        for name in vars(values):
            if values[name] is None and type(None) not in get_args(hints.get(name, None | int)):
                raise UserError(f"{key}.{name}: must have a value; leave it out for the default.")
    for key in ("val_every_steps", "log_samples", "trainer.max_steps"):
        if config[key] is None:
            raise UserError(f"{key}: must have a value; leave it out for the default.")
    for key, (allowed, why) in _TAKEN.items():
        if config[key] not in allowed:
            raise UserError(f"{key}: {why}.")
    if config.trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing: the best and the last weights are always kept; leave it out, or set"
            " trainer.fast_dev_run to try something without a trace."
        )
    for key in _COUNTS:
        if config[key] < 1:
            raise UserError(f"{key}: must be at least 1, not {config[key]}.")
    for key, (words, fits) in _NUMBERS.items():
        if config[key] is not None and not fits(config[key]):
            raise UserError(f"{key}: must be {words}, not {config[key]}.")
    for section in ("checkpoint", "early_stopping"):
        if config[section].mode not in ("min", "max"):
            raise UserError(f"{section}.mode: must be 'min' or 'max', not {config[section].mode!r}.")
        if config[section].monitor not in MONITORS:
            raise UserError(
                f"{section}.monitor: {config[section].monitor!r} is not measured in a validation; choose one of"
                f" {', '.join(MONITORS)}."
            )


def check_decoding(decoding: Any) -> None:  # noqa: ANN401
    """Check that predict can abstain as it is asked to.

    Raises:
        UserError: naming the key.
    """
    least = decoding.abstain_below
    if least is not None and not 0 <= least <= 1:
        raise UserError(f"model.decoding.abstain_below: must be a probability from 0 to 1, not {least}.")
    if least is not None and decoding.mode == "generate":
        raise UserError(
            "model.decoding.abstain_below: 'generate' gives no probabilities; set model.decoding.mode to 'likelihood'"
            " or 'constrained', or leave abstain_below out."
        )
