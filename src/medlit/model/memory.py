"""The memory estimate: GPU memory of a training micro-batch, and how many layers must be recomputed to fit a budget.

Without recomputation a layer keeps what its backward pass reads, with it only its input: slower by a third, in a tenth
of the memory. So the last k layers keep everything, the others are recomputed (Chen 2016, arXiv 1604.06174).

What a layer keeps follows from Unsloth's kernels: the inputs of both norms and of the three fused projections, queries,
keys, values and the attention's output, and both halves of the gated MLP. Per token of an 8B Llama that is 108 KiB in
bfloat16; the tests compare the estimate with peaks measured on an H100.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from medlit.base_model import unreadable
from medlit.model.families import PREFIXES, decoder_prefix, loaded_part, packing_route
from medlit.model.settings import LanguageModel

GIB = 2**30
_HALF = 2  # bytes of an activation in bfloat16 or float16
# Bytes a weight in NF4: half, one a block of 64, and for every 256 of those four (QLoRA, arXiv 2305.14314).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# How many times more a layer of transformers' classes keeps (measured with Phi-3 and Granite), and a layer of a family
# that was not measured, or with DoRA.
_STOCK_LAYER, _UNMEASURED = 1.25, 1.5
SLACK = 0.95  # the allocator loses 2 to 4 % (measured) to gaps between blocks
SAFE = 0.9  # what to stay within after the memory was full, as a share of what was in use then
_HEAD_ROWS = 256  # supervised tokens whose logits are held at once, in half and in twice full precision


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
    parts = list(text.per_layer_config) if text.is_heterogeneous else [text]

    def number(default: int, *names: str) -> int:
        """The first of these settings that is set; the largest where layers differ."""
        given = [value for name in names for part in parts if (value := getattr(part, name, None))]
        return max(given[0]) if given and isinstance(given[0], Sequence) else max(given[: len(parts)], default=default)

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
        return min(self.layers, 1 + max(0, budget - self.peak(tokens, 1)) // max(1, tokens * (self.kept - self.entry)))


class MeasuredMemory(NamedTuple):
    """GPU memory measured during a run, in GiB."""

    peak: float  # the most in use so far; when the memory is full, a lower bound of what is needed
    total: float  # of the GPU; 0 without one


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


def weight_bytes(part: Any, language_model: LanguageModel, itemsize: int, scales: bool = True) -> int:  # noqa: ANN401 - a module
    """Bytes of the weights in use of a base model or of one of its layers, with the scales of 4-bit weights or not."""
    numbers: int = sum(p.numel() for p in part.parameters())
    each = (_NF4 if scales else 0.5) if language_model.load_in_4bit else 1 if language_model.load_in_fp8 else itemsize
    head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    quantised: int = sum(p.weight.numel() for p in part.modules() if isinstance(p, nn.Linear) and p is not head)
    return int(quantised * each) + (numbers - quantised) * itemsize


def free_on(device: torch.device) -> int:
    """Bytes that this process can still allocate: on a GPU, or of this machine's memory, without swap."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def budget_on(device: torch.device, gib: float | None) -> int:
    """Bytes that training may use on a GPU: the setting, but never more than is left for this process."""
    available = free_on(device) + torch.cuda.memory_allocated(device)
    return int(SLACK * (available if gib is None else min(available, gib * GIB)))


class Recomputation:
    """Keeps as many layers' activations as a budget allows, micro-batch by micro-batch.

    The switch is a flag of each layer (transformers' GradientCheckpointingLayer) that is read outside of the compiled
    code, so changing it costs nothing. The last layers are kept: their backward pass comes first, when memory is
    fullest anyway. An offloaded layer is never kept; the one at work then stands beside those that are.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        footprint: Footprint,
        budget: int,
        *,
        random: bool = False,
        offloaded: Collection[int] = (),
    ) -> None:
        self.layers = layers
        self.footprint = footprint
        self.budget = budget
        self.order = [layer for place, layer in enumerate(layers) if place not in offloaded][::-1]
        self.at_work = min(1, len(offloaded))
        self._again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=random)

    def prepare(self, tokens: int) -> int:
        """Choose for a micro-batch of T tokens, padding included; returns the number of layers kept."""
        keeping = min(len(self.order), self.footprint.keeping(tokens, self.budget) - self.at_work)
        kept = self.order[:keeping]
        for layer in self.layers:
            layer.gradient_checkpointing = layer not in kept  # type: ignore[assignment]
            layer._gradient_checkpointing_func = self._again  # type: ignore[assignment]
        return keeping
