"""Prompts that are computed once and gone on from: by labels, or token by token.

Prompts come left-padded and are computed right-padded: under causal attention the padding then lies behind every real
token, so no mask is needed and a GPU takes its fast attention. What follows the prompt is computed with a mask of its
own, which keeps it off the padding.

Unsloth on a GPU takes and gives the cache as a tuple of (keys, values), transformers as a `DynamicCache`; here it is
the tuple, and a pass never changes it.

B notes, T prompt tokens, C cached columns, q new tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from medlit.data.collate import Prompts
from medlit.model.language_model import causal_lm

Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """What a batch has read so far.

    Attributes:
        layers: keys and values of every layer, (B, heads, C, head width) each.
        read: columns of the cache that are the row's own tokens, (B, C) bool.
        lengths: tokens of each row, (B,) int64: the position of what comes next.
        last: hidden state of each row's last token, after the final norm, (B, D).
        plain: the model takes the layers as they are; otherwise as a `DynamicCache`.
    """

    layers: Layers
    read: Tensor
    lengths: Tensor
    last: Tensor
    plain: bool

    def rows(self, chosen: Tensor) -> Prefix:
        """Some of the rows, by their places, (b,) int64."""
        return Prefix(
            tuple((keys[chosen], values[chosen]) for keys, values in self.layers),
            self.read[chosen],
            self.lengths[chosen],
            self.last[chosen],
            self.plain,
        )


def read_prompts(model: nn.Module, prompts: Prompts) -> Prefix:
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
    return Prefix(_layers(cache), columns < lengths[:, None], lengths, last, plain=isinstance(cache, tuple))


def look_ahead(model: nn.Module, prefix: Prefix, tokens: Tensor, offsets: Tensor, sees: Tensor) -> Tensor:
    """Hidden states of tokens that follow every row, which the prefix does not take in.

    Args:
        model: in answer mode.
        prefix: B rows.
        tokens: the same for every row, (q,) int64.
        offsets: each token's distance from the prefix's end, 0 for the next one, (q,) int64.
        sees: which of the new tokens each attends to, itself included, (q, q) bool.

    Returns:
        After the final norm, (B, q, D).
    """
    rows = len(prefix.read)
    hidden, _ = _pass(
        model,
        prefix,
        tokens.expand(rows, -1),
        prefix.lengths[:, None] + offsets,
        sees.expand(rows, -1, -1),
        keep=False,
    )
    return hidden


def read_on(model: nn.Module, prefix: Prefix, tokens: Tensor, real: Tensor) -> Prefix:
    """Take in what follows each row.

    Args:
        model: in answer mode.
        prefix: B rows.
        tokens: right-padded, at least one of each row real, (B, q) int64.
        real: True on tokens, False on padding, (B, q) bool.
    """
    width = tokens.shape[1]
    counts = real.sum(dim=1)
    positions = prefix.lengths[:, None] + torch.arange(width, device=tokens.device)
    before = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
    hidden, layers = _pass(model, prefix, tokens, positions, before.expand(len(tokens), -1, -1), keep=True)
    last = hidden[torch.arange(len(tokens), device=tokens.device), counts - 1]
    return Prefix(layers, torch.cat([prefix.read, real], dim=1), prefix.lengths + counts, last, prefix.plain)


def _pass(
    model: nn.Module, prefix: Prefix, tokens: Tensor, positions: Tensor, sees: Tensor, *, keep: bool
) -> tuple[Tensor, Layers]:
    """One forward of q tokens a row; the layers only where they are to be kept."""
    inner = causal_lm(model)
    width = tokens.shape[1]
    allowed = torch.cat([prefix.read[:, None, :].expand(-1, width, -1), sees], dim=2)
    dtype = prefix.layers[0][0].dtype
    # Added to the attention's scores: the one form that both Unsloth and every attention of transformers take.
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    mask = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
    with torch.no_grad():
        out = inner.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=prefix.layers if prefix.plain else DynamicCache(ddp_cache_data=prefix.layers),
            use_cache=keep,
        )
    return out[0], _layers(out.past_key_values) if keep else ()


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head: (n, D) -> (n, V) float32."""
    inner = causal_lm(model)
    head = inner.lm_head
    weight, plain = head.weight, type(head) is nn.Linear and head.bias is None
    hidden = hidden.to(weight.dtype)
    with torch.no_grad():
        if plain and hidden.is_cuda and hidden.dtype != torch.float32:
            # Rounded to bfloat16, logits of two digits are multiples of 1/16 and often equal.
            scores: Tensor = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            scores = head(hidden).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    if cap:  # Gemma 2
        scores = cap * torch.tanh(scores / cap)
    return scores


def _layers(cache: Any) -> Layers:  # noqa: ANN401 - a tuple of pairs, or transformers' cache
    if isinstance(cache, tuple):
        return cache
    return tuple((layer.keys, layer.values) for layer in cache.layers)
