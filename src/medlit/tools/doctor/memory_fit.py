"""Whether a fit fits into memory, worked out from the base model's configuration before anything is loaded.

On a GPU training is `model/memory.py`'s estimate, which was measured. Weights are counted layer by layer; an
evaluation keeps the keys and values of its batch and one layer's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medlit.model.memory import model_dimensions
from medlit.model.memory import GIB, SLACK, Footprint, budget_on, footprint, skeleton
from medlit.model.memory import loaded as bytes_loaded
from medlit.model.settings import LanguageModel, Lora
from medlit.tools.doctor.check_result import Row

# Several projections in one; Unsloth gives each of them an adapter.
_FUSED = ("qkv_proj", "gate_up_proj")
# On a CPU: what Python and the libraries take, and how many times more a layer keeps than Unsloth's kernels do, in
# float32 and with every adapter's own copy of its input. Measured with the bundled 135M: see tests/test_doctor.py.
_LIBRARIES = int(1.1 * GIB)
_UNFUSED = 4.0
# Share of the free memory above which it is close.
_CLOSE = 0.9


@dataclass(frozen=True)
class Need:
    """Bytes that a fit takes.

    Attributes:
        weights: of the base model as it is loaded, and of the libraries on a CPU.
        adapter: LoRA weights, their gradients and 8-bit optimizer state.
        training: what the largest micro-batch takes beyond these, at the least.
        evaluation: what the largest evaluation batch takes beyond the weights.
        layers: decoder layers.
        kept: layers that need not be computed twice.
    """

    weights: int
    adapter: int
    training: int
    evaluation: int
    layers: int
    kept: int

    @property
    def total(self) -> int:
        """The most that is taken at any moment."""
        return self.weights + self.adapter + max(self.training, self.evaluation)


def need(
    config: Any,  # noqa: ANN401 - as for `model_dimensions`
    language_model: LanguageModel,
    lora: Lora,
    tokens: int,
    answering: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Need:
    """What a fit will take.

    Args:
        config: the base model's, of transformers.
        language_model: how it is loaded.
        lora: the adapter.
        tokens: of the largest training micro-batch, padding included.
        answering: of the largest evaluation batch, with room for the answers.
        device: where.
        dtype: of what is not quantised.
    """
    half = dtype.itemsize
    model = skeleton(config)
    trained = _trained(model, lora)
    loaded = bytes_loaded(model, language_model.load_in_4bit, half)
    takes = footprint(config, 0, trained)
    kept = _kept(takes, language_model, loaded + trained * 4, tokens, device)
    training = takes.peak(tokens, kept) - trained * (4 + 2)
    of = model_dimensions(config)
    answered = half * answering * (of.layers * 2 * of.keys + 4 * of.hidden + 3 * of.inner)
    if device.type == "cpu":
        loaded += _LIBRARIES
        training = int(_UNFUSED * training)
    return Need(loaded, trained * (4 + 4 + 2), training, answered, of.layers, kept)


def _trained(model: nn.Module, lora: Lora) -> int:
    """Weights of the adapter."""
    targets = (*lora.target_modules, *_FUSED)
    return sum(
        lora.r * (part.in_features + part.out_features)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in targets
    )


def _kept(takes: Footprint, language_model: LanguageModel, loaded: int, tokens: int, device: torch.device) -> int:
    """Layers whose activations are kept, as the fit itself will choose."""
    if language_model.gradient_checkpointing == "unsloth":
        return 1
    if language_model.gradient_checkpointing == "off" or device.type != "cuda":
        return takes.layers
    return takes.keeping(tokens, budget_on(device, language_model.memory_budget_gib) - loaded)


def memory_row(takes: Need, free: int, where: str, tokens: int) -> Row:
    """Compare with what is free.

    Args:
        takes: the estimate.
        free: bytes.
        where: whose memory it is, as a sentence names it.
        tokens: of the largest training micro-batch.
    """
    parts = [
        f"weights {takes.weights / GIB:.1f}",
        f"adapter and optimizer {takes.adapter / GIB:.1f}",
        f"a training micro-batch of {tokens:,} tokens {takes.training / GIB:.1f}"
        f" ({takes.kept} of {takes.layers} layers kept)",
        f"answering {takes.evaluation / GIB:.1f}",
    ]
    found = f"about {takes.total / GIB:.1f} of {free / GIB:.1f} GiB that are free on {where}: {', '.join(parts)}"
    cure = "set data.batching.micro_batch_size or model.language_model.max_length lower, or choose a smaller base model"
    if takes.evaluation > takes.training:
        cure = (
            "set data.batching.eval_batch_size or model.language_model.max_length lower, or choose a smaller base model"
        )
    elif takes.kept > 1:
        cure = f"set model.language_model.gradient_checkpointing to 'unsloth', or {cure.removeprefix('set ')}"
    if takes.total > SLACK * free:
        return Row("memory", "fail", found, cure)
    if takes.total > _CLOSE * free:
        return Row("memory", "warn", f"{found}; that is close", cure)
    return Row("memory", "ok", found)
