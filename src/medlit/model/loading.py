"""Loading the base model through Unsloth, in 4 bits, with a new adapter; what cannot be loaded as set is refused."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import nn

from medlit.base_model import TRIED_FAMILIES, missing, resolve
from medlit.errors import UserError
from medlit.model import memory
from medlit.model.families import FUSED_TARGETS, causal_lm, enable_packing, load_options, text_config
from medlit.model.language_model import dtype_for, unsloth_checkpointing
from medlit.model.self_check import check_numbers
from medlit.model.settings import LOFTQ, LanguageModel, Lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_log = logging.getLogger(__name__)


def load_model(language_model: LanguageModel, lora: Lora | None, device: torch.device) -> nn.Module:
    """Load the base model on a device and give it a new adapter; without LoRA settings the bare base model.

    Raises:
        UserError: there is no such model, or it or the machine does not support the settings.
    """
    from unsloth import FastLanguageModel  # isort: skip - before transformers
    from transformers import AutoConfig

    if device.type == "cpu" and lora is not None and language_model.dtype == "float16":
        raise UserError("model.language_model.dtype: float16 does not train on a CPU; set it to 'auto'.")
    output = io.StringIO()
    source = resolve(language_model.base_model)
    try:
        config = AutoConfig.from_pretrained(source, revision=language_model.revision, trust_remote_code=False)
        check_stored(language_model, config)
        _check_memory(language_model, config, device)
        # Unsloth prints a banner to standard output, which is for predictions.
        with contextlib.redirect_stdout(output):
            model, _ = FastLanguageModel.from_pretrained(
                source,
                revision=language_model.revision,
                # Otherwise Unsloth replaces many names by another repository ('-bnb-4bit' added or cut off), drops the
                # revision, and asks GitHub for a newer list of names that it does not know.
                use_exact_model_name=True,
                max_seq_length=language_model.max_length,
                dtype=dtype_for(device, language_model.dtype),
                load_in_4bit=language_model.load_in_4bit,
                device_map={"": str(device)},
                use_gradient_checkpointing=unsloth_checkpointing(language_model),
                trust_remote_code=False,
                **load_options(config, on_gpu=device.type == "cuda"),
            )
            _check_loaded(model, language_model)
            if lora is not None:
                _check_targets(model, lora)
                if lora.loftq:
                    check_loftq(model, device)
                model = FastLanguageModel.get_peft_model(
                    model,
                    **lora.as_peft(),
                    init_lora_weights="loftq" if lora.loftq else True,
                    loftq_config=LOFTQ if lora.loftq else None,
                    use_gradient_checkpointing=unsloth_checkpointing(language_model),
                    random_state=lora.seed,
                    max_seq_length=language_model.max_length,
                )
                for name, parameter in model.named_parameters():  # Unsloth freezes what is no LoRA matrix
                    ends = {"all": ".bias", "lora_only": ".base_layer.bias"}
                    if lora.bias in ends and name.endswith(ends[lora.bias]):
                        parameter.requires_grad_(True)
    except (SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"model.language_model.base_model: the weights of {language_model.base_model} are truncated, damaged, or"
            " mixed with code; download or copy them again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or not _is_missing(error):
            raise
        raise missing(language_model.base_model, language_model.revision) from error
    finally:
        for line in filter(str.strip, output.getvalue().splitlines()):
            _log.debug(line)
    if device.type == "cuda":
        enable_packing(model, language_model.max_length)
    check_numbers(model, language_model)
    if untried := untried_family(model):
        rank_zero_info(f"medlit: {language_model.base_model}: {untried}")
    return model  # type: ignore[no-any-return]


def untried_family(model: nn.Module) -> str:
    """A note on a family of base models that medlit was not tried with; empty for the others."""
    family = causal_lm(model).config.model_type
    if family in TRIED_FAMILIES:
        return ""
    return f"models of the family {family!r} are untried, beyond the check of these numbers (docs/hardware.md)"


def _is_missing(error: Exception) -> bool:
    """Whether a loader's error means that there is no model: an OSError, or Unsloth's message."""
    return isinstance(error, OSError) or "No config file found" in str(error) or "offline" in str(error).lower()


def check_stored(language_model: LanguageModel, config: PretrainedConfig) -> None:
    """Refuse to load weights in 16 bits that are stored in 4, before they are downloaded.

    Raises:
        UserError: they are stored in 4 bits and load_in_4bit is false.
    """
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("load_in_4bit") and not language_model.load_in_4bit:
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} is stored in 4-bit; set it to true, or"
            " name a base model with 16-bit weights."
        )


def _check_memory(language_model: LanguageModel, config: PretrainedConfig, device: torch.device) -> None:
    """Refuse a model that is too large before its weights are read, which takes minutes.

    Weights that cannot be counted, or are stored in neither 16 nor 4 bits, pass.
    """
    stored = getattr(config, "quantization_config", None)
    if stored and not stored.get("load_in_4bit"):
        return
    try:
        model = memory.skeleton(config)
    except ValueError:
        return
    itemsize = dtype_for(device, language_model.dtype).itemsize
    needed = memory.weight_bytes(model, language_model.load_in_4bit, itemsize)
    free = memory.free_on(device)
    if needed <= free:
        return
    place = f"the GPU {device} has" if device.type == "cuda" else "this machine has"
    raise UserError(
        f"model.language_model.base_model: the weights of {language_model.base_model} take about"
        f" {needed / memory.GIB:,.0f} GiB{' in 4 bit' if language_model.load_in_4bit else ''}, and {place}"
        f" {free / memory.GIB:,.1f} GiB free; every process holds the whole model, so choose a smaller base model or a"
        " device with more memory."
    )


def _check_loaded(model: nn.Module, language_model: LanguageModel) -> None:
    """Refuse a model that Unsloth loaded in 16 bits instead of 4, which it does without an error."""
    from bitsandbytes.nn import Params4bit

    if language_model.load_in_4bit and not any(isinstance(p, Params4bit) for p in model.parameters()):
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} did not load in 4-bit: Unsloth keeps a"
            " repository named '-bf16' in 16 bits, one with another quantisation (GPTQ, AWQ, fp8) as it is, and every"
            " model where bitsandbytes does not work (see 'medlit doctor'); set it to false, or name another base"
            " model."
        )


def _check_targets(model: nn.Module, lora: Lora) -> None:
    """Refuse LoRA settings that fit no layer; PEFT ignores them as long as another one fits."""
    names = [name for name, _ in model.named_modules()]
    # Unsloth trains an adapter of `lm_head` as a copy of its weights.
    linear = {n for n, part in model.named_modules() if isinstance(part, nn.Linear) and not n.endswith("lm_head")}
    given = [(name, text, f"({text})") for name in ("rank_pattern", "alpha_pattern") for text in getattr(lora, name)]
    if isinstance(lora.target_modules, list):
        ends = {text: f"({re.escape(text)}|{FUSED_TARGETS.get(text, re.escape(text))})" for text in lora.target_modules}
        given += [("target_modules", text, end) for text, end in ends.items()]
    given = [(name, text, rf"(.*\.)?{end}") for name, text, end in given]
    if isinstance(lora.target_modules, str):
        given.append(("target_modules", lora.target_modules, lora.target_modules))
    for setting, text, pattern in given:
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error:
            found = set()
        if not found or (setting == "target_modules" and not found <= linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"model.lora.{setting}: the base model has no linear layer called {text!r} for an adapter; it has"
                f" {known}."
            )
    layers = text_config(model).num_hidden_layers
    if lora.layers_to_transform and max(lora.layers_to_transform) >= layers:
        raise UserError(f"model.lora.layers_to_transform: the base model has {layers} layers, from 0 to {layers - 1}.")


def check_loftq(model: nn.Module, device: torch.device) -> None:
    """LoftQ quantises the weights itself, with kernels that only a GPU has."""
    from bitsandbytes.nn import Params4bit

    if device.type != "cuda":
        raise UserError("model.lora.loftq: it is computed on a GPU; set it to false on this machine.")
    if any(isinstance(parameter, Params4bit) for parameter in model.parameters()):
        raise UserError(
            "model.lora.loftq: it starts from weights that are not quantised; set model.language_model.load_in_4bit"
            " to false and name a base model with 16-bit weights."
        )
