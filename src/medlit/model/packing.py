"""Attention over packed notes, which lie end to end in one row: each token attends to its own note's earlier tokens.

Unsloth compiles a decoder layer into one region, but not when it is given packed lengths, and without flash-attn it
then runs one kernel a note. PyTorch's varlen kernel takes all notes at once and compiles; so the notes' starts travel
to the attention call in place of a mask, which nothing else reads in training.

Measured on an H100 (8B, NF4, LoRA r 16, 32 notes a step in 4 micro-batches): 15,000 tokens/s without recomputation and
10,600 with it; Unsloth's packing inside TRL's trainer, which recomputes, reached 5,800.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Attribute of Unsloth's module that keeps its own attention call.
_STOCK = "_medlit_stock_run_attention"


def enable(model: nn.Module, max_length: int) -> None:
    """Let Unsloth's Llama attention take packed notes, and keep its model from cutting them at one note's limit.

    Args:
        model: loaded on a GPU.
        max_length: most tokens of one note.
    """
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
    """Unsloth's attention call with packed notes sent to a varlen kernel.

    Args:
        stock: Unsloth's call: `config`, `context`, and `Q`, `K`, `V` of (B, heads, T, D), to (B, T, heads, D).
        kernel: attention for packed notes, which are recognised by a mask of one dimension.
    """

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
        starts = context.causal_mask
        if isinstance(starts, torch.Tensor) and starts.dim() == 1:
            query, key, value = (x.squeeze(0).transpose(0, 1).contiguous() for x in (Q, K, V))
            return kernel(query, key, value, starts).unsqueeze(0)
        return stock(config=config, context=context, Q=Q, K=K, V=V)

    return run_attention
