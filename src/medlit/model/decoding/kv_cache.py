"""Prompts that are computed once and continued: by labels, or token by token.

Prompts come left-padded and are computed right-padded: under causal attention the padding then comes after every real
token, so no mask is needed and a GPU uses its fast attention. What follows the prompt is computed with an explicit
mask, which hides the padding.

Unsloth on a GPU takes and returns the cache as a tuple of (keys, values), transformers as a `DynamicCache`; here it is
the tuple, and a pass never changes it.

B notes, T prompt tokens, C cached columns, q new tokens a row, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from medlit.data.collate import Prompts
from medlit.model.families import causal_lm

Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of B rows."""

    layers: Layers  # keys and values of every layer, (B, heads, C, head width) each
    mask: Tensor  # columns that are the row's own tokens, (B, C) bool
    lengths: Tensor  # tokens of each row, (B,) int64: the position of the next token
    last: Tensor  # hidden state of each row's last token, after the final norm, (B, D)
    as_tuple: bool  # the model takes the layers as a tuple; otherwise as a `DynamicCache`

    def rows(self, chosen: Tensor) -> KVCache:
        """Some of the rows, by their indices, (b,) int64."""
        return KVCache(
            tuple((keys[chosen], values[chosen]) for keys, values in self.layers),
            self.mask[chosen],
            self.lengths[chosen],
            self.last[chosen],
            self.as_tuple,
        )


def read_prompts(model: nn.Module, prompts: Prompts) -> KVCache:
    """Compute left-padded prompts, (B, T)."""
    inner = causal_lm(model)
    mask = prompts.attention_mask.bool()
    lengths, width = mask.sum(dim=1), mask.shape[1]
    columns = torch.arange(width, device=mask.device)
    ids = prompts.input_ids.gather(1, (columns + (width - lengths)[:, None]) % width)
    with torch.no_grad():
        out = inner.model(input_ids=ids, use_cache=True)
    last = out[0][torch.arange(len(ids), device=ids.device), lengths - 1]
    cache = out.past_key_values
    return KVCache(_layers(cache), columns < lengths[:, None], lengths, last, as_tuple=isinstance(cache, tuple))


def look_ahead(model: nn.Module, cache: KVCache, tokens: Tensor, offsets: Tensor, attends: Tensor) -> Tensor:
    """Hidden states of tokens that follow every row; the cache stays as it is.

    Args:
        model: in inference mode.
        cache: B rows.
        tokens: the same for every row, (q,) int64.
        offsets: each token's distance from the row's end, 0 for the next one, (q,) int64.
        attends: which of the new tokens each attends to, itself included, (q, q) bool.

    Returns:
        After the final norm, (B, q, D).
    """
    rows = len(cache.mask)
    positions = cache.lengths[:, None] + offsets
    hidden, _ = _forward(model, cache, tokens.expand(rows, -1), positions, attends.expand(rows, -1, -1), keep=False)
    return hidden


def extend(model: nn.Module, cache: KVCache, tokens: Tensor, real: Tensor) -> KVCache:
    """Append tokens to each row.

    Args:
        model: in inference mode.
        cache: B rows.
        tokens: right-padded, at least one of each row real, (B, q) int64.
        real: True on tokens, False on padding, (B, q) bool.
    """
    width = tokens.shape[1]
    counts = real.sum(dim=1)
    positions = cache.lengths[:, None] + torch.arange(width, device=tokens.device)
    causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
    hidden, layers = _forward(model, cache, tokens, positions, causal.expand(len(tokens), -1, -1), keep=True)
    last = hidden[torch.arange(len(tokens), device=tokens.device), counts - 1]
    return KVCache(layers, torch.cat([cache.mask, real], dim=1), cache.lengths + counts, last, cache.as_tuple)


def _forward(
    model: nn.Module, cache: KVCache, tokens: Tensor, positions: Tensor, attends: Tensor, *, keep: bool
) -> tuple[Tensor, Layers]:
    """One forward pass of q tokens a row; returns the layers only where they are kept."""
    inner = causal_lm(model)
    allowed = torch.cat([cache.mask[:, None, :].expand(-1, tokens.shape[1], -1), attends], dim=2)
    dtype = cache.layers[0][0].dtype
    # An additive mask is the one form that Unsloth and every attention of transformers accept.
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    mask = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
    with torch.no_grad():
        out = inner.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache.layers if cache.as_tuple else DynamicCache(ddp_cache_data=cache.layers),
            use_cache=keep,
        )
    return out[0], _layers(out.past_key_values) if keep else ()


def _layers(cache: Any) -> Layers:  # noqa: ANN401 - a tuple of pairs, or transformers' cache
    if isinstance(cache, tuple):
        return cache
    return tuple((layer.keys, layer.values) for layer in cache.layers)
