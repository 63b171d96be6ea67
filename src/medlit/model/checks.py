"""What a base model must be before it is trained as asked; every fault is one sentence with its key and the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from medlit.errors import UserError
from medlit.model import memory
from medlit.model.precision import dtype_for
from medlit.model.settings import LanguageModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_stored(language_model: LanguageModel, config: PretrainedConfig) -> None:
    """Weights that are stored in 4 bits load in 4 bits, whatever is asked for; say so before they are fetched.

    Args:
        language_model: what to load.
        config: the base model's own.

    Raises:
        UserError: 16 bits are asked for.
    """
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("load_in_4bit") and not language_model.load_in_4bit:
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} is stored in 4-bit; set it to true, or"
            f" name a base"
            " model with 16-bit weights."
        )


def check_room(language_model: LanguageModel, config: PretrainedConfig, device: torch.device) -> None:
    """A model that is far too large would be read for minutes, 40 GB and more, before it fails.

    Args:
        language_model: what to load.
        config: the base model's own; of a kind that cannot be counted, or stored in another form than 16 or 4 bits,
            nothing is said.
        device: where to.

    Raises:
        UserError: its weights alone are more than there is room for.
    """
    stored = getattr(config, "quantization_config", None)
    if stored and not stored.get("load_in_4bit"):
        return
    try:
        model = memory.skeleton(config.get_text_config())
    except ValueError:
        return
    needs = memory.loaded(model, language_model.load_in_4bit, dtype_for(device, language_model.dtype).itemsize)
    free = memory.free_on(device)
    if needs <= free:
        return
    where = f"the GPU {device} has" if device.type == "cuda" else "this machine has"
    raise UserError(
        f"model.language_model.base_model: the weights of {language_model.base_model} take about"
        f" {needs / memory.GIB:,.0f} GiB"
        f"{' in 4 bit' if language_model.load_in_4bit else ''}, and {where} {free / memory.GIB:,.1f} GiB free; every"
        f" process"
        " holds the whole model, so choose a smaller base model or a device with more memory."
    )


def check_held(model: nn.Module, language_model: LanguageModel) -> None:
    """Unsloth falls back to 16 bits without an error.

    Raises:
        UserError: 4 bits are asked for.
    """
    from bitsandbytes.nn import Params4bit

    if language_model.load_in_4bit and not any(isinstance(parameter, Params4bit) for parameter in model.parameters()):
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} did not load in 4-bit: Unsloth keeps a"
            f" repository"
            " named '-bf16' in 16 bits and one that is quantised otherwise (GPTQ, AWQ, fp8) as it is, and all of them"
            " where bitsandbytes does not work ('medlit doctor' tells); set it to false, or name another base model."
        )


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """PEFT passes over a target that no layer has as long as another one has.

    Raises:
        UserError: the model has no such layers.
    """
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    # Unsloth takes the names of split projections for a model that has them in one.
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    absent = [name for name in targets if name not in leaves and fused.get(name) not in leaves]
    if absent:
        linear = sorted({name for name in leaves if name.endswith("_proj")})
        raise UserError(
            f"model.lora.target_modules: the base model has no layer called {absent[0]!r}; it has {', '.join(linear)}."
        )


def check_loftq(model: nn.Module, device: torch.device) -> None:
    """LoftQ quantises the weights itself, with kernels that only a GPU has.

    Raises:
        UserError: there is no GPU, or the weights are quantised already.
    """
    from bitsandbytes.nn import Params4bit

    if device.type != "cuda":
        raise UserError("model.lora.loftq: it is computed on a GPU; set it to false on this machine.")
    if any(isinstance(parameter, Params4bit) for parameter in model.parameters()):
        raise UserError(
            "model.lora.loftq: it starts from weights that are not yet in 4-bit; set"
            " model.language_model.load_in_4bit to"
            " false and name a base model that is not quantised."
        )
