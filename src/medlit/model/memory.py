"""The memory estimate: GPU memory of a training micro-batch, and how many layers must be recomputed to fit a budget.

Without recomputation a layer keeps what its backward pass reads, with it only its input: slower by a third, in a tenth
of the memory. So the last k layers keep everything, the others are recomputed (Chen 2016, arXiv 1604.06174).

What a layer keeps follows from Unsloth's kernels: the inputs of both norms and of the three fused projections, queries,
keys, values and the attention's output, and both halves of the gated MLP. Per token of an 8B Llama that is 108 KiB in
bfloat16; the tests compare the estimate with peaks measured on an H100.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medlit.base_model import unreadable
from medlit.errors import UserError
from medlit.model.families import PREFIXES, decoder_prefix, fit_targets, loaded_part, packing_route, target_layers
from medlit.model.settings import LanguageModel, Lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 2**30
# Bytes of an activation in bfloat16 or float16.
_HALF = 2
# Bytes a weight in NF4: half, one a block of 64, and for every 256 of those four (QLoRA, arXiv 2305.14314).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# How many times more a layer of transformers' classes keeps (measured with Phi-3 and Granite), and a layer of a family
# that was not measured, or with DoRA.
_STOCK_LAYER, _UNMEASURED = 1.25, 1.5
# The allocator loses 2 to 4 % (measured) to gaps between blocks.
SLACK = 0.95
# Activations that "unsloth" checkpointing keeps, as a share of all, measured with 8B: (9.6 - 6) of (60.3 - 6) GiB.
CHECKPOINTED = 0.07
# What to stay within after the memory was full, as a share of what was in use then.
SAFE = 0.9
# Supervised tokens whose logits are held at once, in half and in twice full precision.
_HEAD_ROWS = 256
# On a CPU: what Python and the libraries take, and how many times more a layer keeps than with Unsloth's kernels, in
# float32 and with a copy of its input for each adapter. Measured with the bundled 135M: see tests/model/test_memory.py.
_LIBRARIES = int(1.1 * GIB)
_UNFUSED = 4.0


class ModelDimensions(NamedTuple):
    """Widths of a decoder with gated MLPs, in values per token."""

    layers: int  # decoder layers
    hidden: int  # of the residual stream
    queries: int  # of all heads together
    keys: int  # of all heads together; the values' width is the same
    inner: int  # of the MLP
    vocabulary: int  # number of tokens


def model_dimensions(config: Any) -> ModelDimensions:  # noqa: ANN401 - transformers' configurations share no typed base for these
    """Read a transformers configuration; what a family does not state is taken as a Llama's."""
    text = config.get_text_config(decoder=True)

    def number(default: int, *names: str) -> int:
        """The first of these settings that is set; the largest where layers differ."""
        given = next((value for name in names if (value := getattr(text, name, None))), default)
        return max(given) if isinstance(given, Sequence) else given

    hidden, heads = number(1, "hidden_size"), number(1, "num_attention_heads")
    width = number(hidden // heads, "head_dim")
    return ModelDimensions(
        layers=number(1, "num_hidden_layers"),
        hidden=hidden,
        queries=heads * width,
        keys=number(heads, "num_key_value_heads") * width,
        inner=number(4 * hidden, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
        vocabulary=text.vocab_size,
    )


@dataclass(frozen=True)
class Footprint:
    """GPU memory of one micro-batch's forward and backward pass, in bytes."""

    layers: int  # decoder layers
    fixed: int  # independent of the batch: weights, adapter with gradients and optimizer state, work space
    kept: int  # per token and layer that is not recomputed
    entry: int  # per token and layer that is recomputed: its input
    work: int  # per token, once: the backward pass of a gated MLP

    def peak(self, tokens: int, keeping: int) -> int:
        """Most bytes in use for T tokens, padding included; with 0 layers kept, the layer at work still is."""
        layers = max(keeping, 1) * self.kept + (self.layers - keeping) * self.entry
        return self.fixed + tokens * (layers + self.work)

    def keeping(self, tokens: int, budget: int) -> int:
        """The most layers that can be kept within a budget in bytes; recomputing the last would save nothing."""
        spare = max(0, budget - self.peak(tokens, 1))
        return min(self.layers, 1 + spare // max(1, tokens * (self.kept - self.entry)))


@dataclass(frozen=True)
class MeasuredMemory:
    """GPU memory measured during a run, in GiB."""

    weights: float  # before the first step
    peak: float  # the most in use so far; when the memory is full, a lower bound of what is needed
    total: float  # of the GPU; 0 without one

    @classmethod
    def of(cls, weights: float) -> MeasuredMemory:
        """Measure this process's GPU."""
        if not torch.cuda.is_available():
            return cls(weights, 0.0, 0.0)
        return cls(weights, torch.cuda.max_memory_allocated() / GIB, torch.cuda.mem_get_info()[1] / GIB)


def footprint(config: Any, weights: int, trained: int, dora: bool = False) -> Footprint:  # noqa: ANN401 - as above
    """The footprint of a 4-bit model: bytes of its weights, trained parameters, and whether it trains DoRA."""
    of = model_dimensions(config)
    kept = _HALF * (4 * of.hidden + 2 * of.queries + 2 * of.keys + 2 * of.inner)
    more = _UNMEASURED if dora else {"stock": _STOCK_LAYER, None: _UNMEASURED}.get(packing_route(config), 1)
    # One matrix at a time is dequantised.
    room = _HALF * of.hidden * of.inner + (_HALF + 4 + 4) * _HEAD_ROWS * of.vocabulary
    return Footprint(
        layers=of.layers,
        fixed=weights + trained * (4 + 2) + room,  # a gradient in float32 and two states of one byte
        kept=int(more * kept),
        entry=_HALF * of.hidden,
        work=4 * _HALF * of.inner,
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A base model as it is loaded, on the meta device, with nothing read; a UserError if medlit does not train it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    def build(of: PretrainedConfig) -> PreTrainedModel:
        auto = AutoModelForCausalLM if type(of) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
        with torch.device("meta"):
            return auto.from_config(of)  # type: ignore[no-any-return, no-untyped-call]

    model = build(part := loaded_part(config))
    if part is not config:
        try:
            prefixes = decoder_prefix(model), decoder_prefix(build(config))
        except ImportError as error:  # another package has its vision tower
            raise unreadable(config.name_or_path or config.model_type, error) from error
        if len(set(prefixes)) > 1:
            setattr(model, PREFIXES, prefixes)
    return model


def weight_bytes(skeleton: PreTrainedModel, in_4bit: bool, itemsize: int) -> int:
    """Bytes of a base model's loaded weights, counted layer by layer."""
    numbers = sum(p.numel() for p in skeleton.parameters())
    if not in_4bit:
        return numbers * itemsize
    head = skeleton.get_output_embeddings()
    linear = [part for part in skeleton.modules() if isinstance(part, nn.Linear) and part is not head]
    quantised = sum(part.weight.numel() for part in linear)
    return int(quantised * _NF4) + (numbers - quantised) * itemsize


def free_on(device: torch.device) -> int:
    """Bytes that this process can still allocate: on a GPU, or of this machine's memory and swap."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def budget_on(device: torch.device, gib: float | None) -> int:
    """Bytes that training may use on a GPU: the setting, but never more than is left for this process."""
    available = free_on(device) + torch.cuda.memory_allocated(device)
    return int(SLACK * (available if gib is None else min(available, gib * GIB)))


class Recomputation:
    """Keeps as many layers' activations as a budget allows, micro-batch by micro-batch.

    The switch is a flag of each layer (transformers' GradientCheckpointingLayer) that is read outside of the compiled
    code, so changing it costs nothing. The last layers are kept: their backward pass comes first, when memory is
    fullest anyway.
    """

    def __init__(self, layers: Sequence[nn.Module], footprint: Footprint, budget: int, *, random: bool = False) -> None:
        self.layers = layers
        self.footprint = footprint
        self.budget = budget
        self._again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=random)

    def prepare(self, tokens: int) -> int:
        """Choose for a micro-batch of T tokens, padding included; returns the number of layers kept."""
        keeping = self.footprint.keeping(tokens, self.budget)
        again = len(self.layers) - keeping
        for place, layer in enumerate(self.layers):
            layer.gradient_checkpointing = place < again  # type: ignore[assignment]
            layer._gradient_checkpointing_func = self._again  # type: ignore[assignment]
        return keeping


@dataclass(frozen=True)
class FitMemory:
    """Bytes that a fit takes, estimated before anything is loaded."""

    weights: int  # the base model as loaded, and on a CPU the libraries
    adapter: int  # LoRA weights, their gradients and 8-bit optimizer state
    training: int  # the largest micro-batch, beyond these
    evaluation: int  # the largest evaluation batch, beyond the weights
    layers: int  # decoder layers
    layers_kept: int  # layers whose activations are kept for the backward pass

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
    model = skeleton(config)
    trained = 0 if lora is None else _adapter_size(model, lora)
    weights = weight_bytes(model, language_model.load_in_4bit, dtype.itemsize)
    batch = footprint(config, 0, trained, dora=lora is not None and lora.dora)
    kept = batch.layers
    if language_model.gradient_checkpointing == "unsloth":
        kept = 1
    elif language_model.gradient_checkpointing == "auto" and device.type == "cuda":
        kept = batch.keeping(tokens, budget_on(device, language_model.memory_budget_gib) - weights - 4 * trained)
    training = batch.peak(tokens, kept) - trained * (4 + 2)
    of = model_dimensions(config)
    # An evaluation keeps the keys and values of its batch and the work of one layer.
    evaluation = dtype.itemsize * eval_tokens * (of.layers * 2 * of.keys + 4 * of.hidden + 3 * of.inner)
    if device.type == "cpu":
        weights += _LIBRARIES
        training = int(_UNFUSED * training)
    return FitMemory(weights, trained * (4 + 4 + 2), training, evaluation, batch.layers, kept)


def _adapter_size(model: nn.Module, lora: Lora) -> int:
    from peft.utils.other import get_pattern_key

    with contextlib.suppress(UserError):  # loading refuses what does not fit
        lora = fit_targets(model, lora)
    patterns = lora.as_peft()["rank_pattern"]
    return sum(
        patterns.get(get_pattern_key(patterns, name), lora.r) * sum(part.get_parameter("weight").shape)
        for name, part in target_layers(model, lora).items()
    )
