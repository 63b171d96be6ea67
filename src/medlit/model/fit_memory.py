"""The memory of a fit, estimated before anything is loaded, and how many layers stay in host memory for it."""

import contextlib
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from medlit.errors import UserError
from medlit.model.families import adaptable_layers, decoder_layers, fit_targets, target_layers
from medlit.model.memory import GIB, budget_on, footprint, model_dimensions, skeleton, weight_bytes
from medlit.model.settings import LanguageModel, Lora

_SLOTS = 3  # offloaded layers on the GPU at a time: the one at work and two ahead of it, as in Unsloth's block swap
# The id of the running kernel: processes with the same one share a host, whatever started them.
_KERNEL = Path("/proc/sys/kernel/random/boot_id")
# On a CPU: what Python and the libraries take, and how many times more a layer keeps than with Unsloth's kernels, in
# float32 and with a copy of its input for each adapter. Measured with the bundled 135M: see tests/model/test_memory.py.
_LIBRARIES = int(1.1 * GIB)
UNFUSED = 4.0


class Offload(NamedTuple):
    """Decoder layers that stay in host memory, all but the scales of their 4-bit weights, and what is on the GPU."""

    layers: int = 0
    host: int = 0  # bytes of host memory
    weights: int = 0  # bytes of the base model on the GPU
    trained: int = 0  # parameters of the adapter
    processes: int = 1  # on this host; each has a copy of the layers


def plan_offload(
    model: PreTrainedModel, language_model: LanguageModel, lora: Lora | None, device: torch.device, dtype: torch.dtype
) -> Offload:
    """Choose the layers to offload: as many as `offload` says, a UserError if none can be, or as few as are needed."""
    wanted: str | int = language_model.offload
    weights = weight_bytes(model, language_model, dtype.itemsize)
    trained = 0 if lora is None else _adapter_size(model, lora)
    obstacles = {
        "without a GPU": device.type != "cuda",
        "with gradient_checkpointing 'none'": language_model.gradient_checkpointing == "none",
        "with load_in_fp8": language_model.load_in_fp8,
        "with DoRA or trained biases": lora is not None and (lora.dora or lora.bias != "none"),
    }
    if (why := next((each for each, found in obstacles.items() if found), "")) and wanted not in ("auto", "none", 0):
        raise UserError(f"model.language_model.offload: not {why}; set it to 'auto'.")
    if why or wanted == "none":
        return Offload(weights=weights, trained=trained)
    layers = decoder_layers(model)
    size = weight_bytes(layers[-1], language_model, dtype.itemsize, scales=False)
    if wanted == "auto":
        needed = footprint(model.config, weights, trained).peak(language_model.batch_tokens, 1) + 4 * trained
        over = needed - budget_on(device, language_model.memory_budget_gib)
        wanted = -(-over // size) + _SLOTS if over > 0 else 0
    processes = 1
    if torch.distributed.is_initialized() and language_model.batch_tokens:  # the predictor may load in one process
        mine = int(wanted), _KERNEL.read_text() if _KERNEL.exists() else platform.node()
        everywhere = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, mine)
        wanted = max(count for count, _ in everywhere)  # DDP needs the same layers in every process
        processes = sum(host == mine[1] for _, host in everywhere)
    count = min(int(wanted), len(layers) - 1)
    return Offload(count, count * size, weights - max(0, count - _SLOTS) * size, trained, processes)


def peak_of_loading(model: PreTrainedModel, language_model: LanguageModel, weights: int, dtype: torch.dtype) -> int:
    """Most bytes that loading takes on the device; `weights` are those of the base model once it is loaded."""
    if not language_model.load_in_fp8:
        return weights
    # The whole model is loaded in `dtype`, then its matrices are rounded one by one, with two copies in float32.
    whole = weight_bytes(model, replace(language_model, load_in_fp8=False), dtype.itemsize)
    return whole + 2 * 4 * max(part.get_parameter("weight").numel() for part in adaptable_layers(model).values())


@dataclass(frozen=True)
class FitMemory:
    """Bytes that a fit takes, estimated before anything is loaded."""

    weights: int  # the base model as loaded, and on a CPU the libraries
    adapter: int  # LoRA weights, their gradients and 8-bit optimizer state
    training: int  # the largest micro-batch, beyond these
    evaluation: int  # the largest evaluation batch, beyond the weights
    layers: int  # decoder layers
    layers_kept: int  # layers whose activations are kept for the backward pass
    offload: Offload = field(default_factory=Offload)  # the layers in host memory instead

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapter + max(self.training, self.evaluation)


def fit_memory(
    config: Any,  # noqa: ANN401 - as for `model_dimensions`
    language_model: LanguageModel,
    lora: Lora | None,
    tokens: int,
    eval_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> FitMemory:
    """Estimate a fit's memory from the base model's configuration.

    `config` is of transformers; `tokens` are the padded tokens of the largest training micro-batch and `eval_tokens`
    those of the largest evaluation batch, with its answers; `dtype` is the format of what is not quantised.
    """
    offload = plan_offload(skeleton(config), language_model, lora, device, dtype)
    weights, trained = offload.weights, offload.trained
    batch = footprint(config, 0, trained, dora=lora is not None and lora.dora)
    kept = batch.layers
    if language_model.gradient_checkpointing == "unsloth":
        kept = 1
    elif language_model.gradient_checkpointing == "auto" and device.type == "cuda":
        kept = batch.keeping(tokens, budget_on(device, language_model.memory_budget_gib) - weights - 4 * trained)
        kept = max(1, min(kept, batch.layers - offload.layers + 1))
    training = batch.peak(tokens, kept) - trained * (4 + 2)
    of = model_dimensions(config)
    # An evaluation keeps the keys and values of its batch and the work of one layer.
    evaluation = dtype.itemsize * eval_tokens * (of.layers * 2 * of.keys + 4 * of.hidden + 3 * of.inner)
    if device.type == "cpu":
        weights += _LIBRARIES
        training = int(UNFUSED * training)
    return FitMemory(weights, trained * (4 + 4 + 2), training, evaluation, batch.layers, kept, offload)


def _adapter_size(model: nn.Module, lora: Lora) -> int:
    from peft.utils.other import get_pattern_key

    with contextlib.suppress(UserError):  # loading refuses what does not fit
        lora = fit_targets(model, lora)
    patterns = lora.as_peft()["rank_pattern"]
    return sum(
        patterns.get(get_pattern_key(patterns, name), lora.r) * sum(part.get_parameter("weight").shape)
        for name, part in target_layers(model, lora).items()
    )
