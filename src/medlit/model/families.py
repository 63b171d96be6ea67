"""What differs between the families of base models: the parts of a model, its head, and attention over packed notes.

Packed notes lie end to end in one row, and each token attends to its own note's earlier tokens. Unsloth compiles a
decoder layer into one region, but not when it is given packed lengths, and without flash-attn it then runs one kernel a
note. PyTorch's varlen kernel takes all notes at once and compiles; so the notes' starts travel to the attention call in
place of a mask, which nothing else reads in training. Measured on an H100 (8B, NF4, LoRA r 16, 32 notes a step in 4
micro-batches): 15,000 tokens/s without recomputation and 10,600 with it; Unsloth's packing inside TRL's trainer, which
recomputes, reached 5,800.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medlit.base_model import PACKING_FAMILY

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Attribute of Unsloth's module that keeps its own attention call.
_STOCK = "_medlit_stock_run_attention"
# Names of split projections -> the fused layer that Unsloth adapts in their place.
FUSED_TARGETS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def has_fused_kernels(config: Any) -> bool:  # noqa: ANN401 - transformers' configurations share no typed base
    """Whether Unsloth trains a family with the fused kernels that the memory estimate was measured with."""
    return bool(config.model_type == PACKING_FAMILY)


def can_pack(model: nn.Module) -> bool:
    """Whether a model's attention takes packed notes: a Llama's on a GPU from Ampere on."""
    inner = causal_lm(model)
    if inner.device.type != "cuda" or inner.config.model_type != PACKING_FAMILY:
        return False
    return torch.cuda.get_device_capability(inner.device) >= (8, 0)


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Apply the output head, soft cap included: hidden states (n, D) -> logits (n, V), float32."""
    inner = causal_lm(model)
    head = inner.lm_head
    hidden = hidden.to(head.weight.dtype)
    plain = not torch.is_grad_enabled() and type(head) is nn.Linear and head.bias is None
    if plain and hidden.is_cuda and hidden.dtype != torch.float32:
        # Rounded to bfloat16, logits of two digits are multiples of 1/16 and often tie.
        logits: Tensor = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
    else:
        logits = head(hidden).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    if cap:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def enable_packing(model: nn.Module, max_length: int) -> None:
    """Let Unsloth's Llama attention take packed notes, and keep its model from cutting them at one note's limit."""
    import unsloth.models.llama as unsloth_llama
    from unsloth.utils.packing import mark_allow_overlength

    stock = getattr(unsloth_llama, _STOCK, unsloth_llama.run_attention)
    setattr(unsloth_llama, _STOCK, stock)
    unsloth_llama.run_attention = route(stock, varlen_kernel(max_length))
    mark_allow_overlength(model)


def varlen_kernel(longest: int) -> Kernel:
    """PyTorch's causal varlen attention: (T, heads, D) queries, keys and values and (notes + 1,) starts.

    Args:
        longest: most tokens of a note; the same for every batch, so that nothing is compiled again.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # PyTorch 2.11 groups queries by itself; later versions need the flag.
    extra: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    extra["window_size"] = (-1, 0)  # all earlier tokens, no later ones

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        out = varlen_attn(query, key, value, starts, starts, longest, longest, **extra)
        return out  # type: ignore[return-value]

    return kernel


def route(stock: Callable[..., Tensor], kernel: Kernel) -> Callable[..., Tensor]:
    """Unsloth's attention call, which sends packed notes, recognised by a mask of one dimension, to a varlen kernel."""

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
        starts = context.causal_mask
        if isinstance(starts, torch.Tensor) and starts.dim() == 1:
            query, key, value = (x.squeeze(0).transpose(0, 1).contiguous() for x in (Q, K, V))
            return kernel(query, key, value, starts).unsqueeze(0)
        return stock(config=config, context=context, Q=Q, K=K, V=V)

    return run_attention
