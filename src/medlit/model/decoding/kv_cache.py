"""Prompts that are computed once and continued: by labels, or token by token.

Prompts come left-padded. Where the attention takes packed notes they are computed end to end, their common beginning
once; elsewhere right-padded, which needs no mask under causal attention. What follows is computed with a mask, which
hides the padding and, in layers with a sliding window, the tokens before it. The cache keeps every token, since
the window of one row ends elsewhere than that of another.

Layers with a running state (Mamba, linear attention) keep nothing that several continuations could share. For these
`Replay` computes the prompt again with each continuation: right, but slower. Unsloth on a GPU takes and returns the
cache as a tuple of (keys, values), transformers as a `DynamicCache`; here it is the tuple, and a pass never changes it.

B notes, T prompt tokens, C cached columns, q new tokens a row, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from medlit.data.collate import Prompts
from medlit.model.families import attention_kinds, body, shares_prompts, sliding_window
from medlit.model.packing import block_masks, can_pack, common_beginning, row_multiple, share_beginning, shared_row

Layers = tuple[tuple[Tensor, Tensor], ...]


def read_prompts(model: nn.Module, prompts: Prompts) -> Prefix:
    """Compute left-padded prompts, (B, T), with a model in inference mode."""
    mask = prompts.attention_mask.bool()
    lengths, width = mask.sum(dim=1), mask.shape[1]
    columns = torch.arange(width, device=mask.device)
    ids = prompts.input_ids.gather(1, (columns + (width - lengths)[:, None]) % width)
    real = columns < lengths[:, None]
    if not shares_prompts(model):
        return Replay.of(model, ids, real)
    transformer = body(model)
    if can_pack(model):
        return _read_packed(model, transformer, ids, real, lengths)
    # A cache that knows the sliding windows would drop what lies before them.
    is_stock = type(transformer).forward.__module__.startswith("transformers.")  # and so takes a cache to fill
    own = {"past_key_values": DynamicCache()} if is_stock else {}
    shared = common_beginning(transformer, ids, lengths) if is_stock else 0
    with torch.no_grad():
        if shared:
            first = transformer(input_ids=ids[:1, :shared], use_cache=True, **own).past_key_values
            of_rows = [tuple(x.expand(len(ids), -1, -1, -1) for x in layer) for layer in _layers(first)]
            own["past_key_values"] = DynamicCache(ddp_cache_data=of_rows)
        out = transformer(input_ids=ids[:, shared:], use_cache=True, **own)
    cache, last = out.past_key_values, _last(out[0], lengths - shared)
    return KVCache(model, real, lengths, last, _layers(cache), as_tuple=isinstance(cache, tuple))


def _read_packed(model: nn.Module, inner: nn.Module, ids: Tensor, real: Tensor, lengths: Tensor) -> KVCache:
    """Compute right-padded prompts, (B, T), end to end and their common beginning once."""
    beginning = ((ids == ids[0]) & real).all(dim=0).cumprod(dim=0).sum()
    *counts, shared = torch.cat([lengths, beginning[None]]).tolist()
    row = share_beginning(counts, shared, len(counts) + 2, ids.device, row_multiple(inner))
    packed, positions = ids[real][None], (real.cumsum(dim=1) - 1)[real][None]
    arguments = shared_row(inner, packed, positions, row, cache=True)
    with torch.no_grad(), block_masks(inner, row.starts, arguments):
        hidden, cache = inner(**arguments)[:2]
    # Each prompt's tokens among the computed ones, (B, T).
    place = row.source[(real.flatten().cumsum(dim=0).view_as(ids) - 1).where(real, 0)]
    padded = tuple((k[0, :, place].transpose(0, 1), v[0, :, place].transpose(0, 1)) for k, v in _layers(cache))
    last = hidden[0, place.gather(1, lengths[:, None] - 1)[:, 0]]
    return KVCache(model, real, lengths, last, padded, as_tuple=isinstance(cache, tuple))


@dataclass(frozen=True)
class KVCache:
    """B rows of computed tokens that can be continued, by their keys and values."""

    model: nn.Module
    mask: Tensor  # columns that are the row's own tokens, (B, C) bool
    lengths: Tensor  # tokens of each row, (B,) int64: the position of the next token
    last: Tensor  # hidden state of each row's last token, after the final norm, (B, D)
    layers: Layers  # keys and values of every layer, (B, heads, C, head width) each
    as_tuple: bool  # the model takes the layers as a tuple; otherwise as a `DynamicCache`

    def rows(self, chosen: Tensor) -> KVCache:
        """Some of the rows, by their indices, (b,) int64."""
        layers = tuple((keys[chosen], values[chosen]) for keys, values in self.layers)
        return KVCache(self.model, self.mask[chosen], self.lengths[chosen], self.last[chosen], layers, self.as_tuple)

    def look_ahead(self, tokens: Tensor, offsets: Tensor, attends: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, q, D), of tokens that follow every row; nothing is changed.

        Args:
            tokens: the same for every row, (q,) int64.
            offsets: each token's distance from the row's end, 0 for the next one, (q,) int64.
            attends: which of the new tokens each attends to, itself included, (q, q) bool.
        """
        rows = len(self.mask)
        positions = self.lengths[:, None] + offsets
        hidden, _ = self._forward(tokens.expand(rows, -1), positions, attends.expand(rows, -1, -1), keep=False)
        return hidden

    def extend(self, tokens: Tensor, real: Tensor) -> KVCache:
        """Append right-padded tokens to each row, at least one of which is real, (B, q) int64; `real` is bool."""
        width = tokens.shape[1]
        positions = self.lengths[:, None] + torch.arange(width, device=tokens.device)
        causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
        hidden, layers = self._forward(tokens, positions, causal.expand(len(tokens), -1, -1), keep=True)
        mask, counts = torch.cat([self.mask, real], dim=1), real.sum(dim=1)
        return KVCache(self.model, mask, self.lengths + counts, _last(hidden, counts), layers, self.as_tuple)

    def _forward(self, tokens: Tensor, positions: Tensor, attends: Tensor, *, keep: bool) -> tuple[Tensor, Layers]:
        """One forward pass of q tokens a row; returns the layers only where they are kept."""
        allowed = torch.cat([self.mask[:, None, :].expand(-1, tokens.shape[1], -1), attends], dim=2)
        with torch.no_grad():
            out = body(self.model)(
                input_ids=tokens,
                attention_mask=self.layer_masks(allowed, positions),
                position_ids=positions,
                past_key_values=self.layers if self.as_tuple else DynamicCache(ddp_cache_data=self.layers),
                use_cache=keep,
            )
        return out[0], _layers(out.past_key_values) if keep else ()

    def layer_masks(self, allowed: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask that the layers take, or one for each kind of layer, from (B, q, C + q) bool."""
        window, dtype = sliding_window(self.model), self.layers[0][0].dtype
        # One mask where the window hides nothing, as Unsloth's Gemma 2 takes no other.
        if window is None or window >= allowed.shape[2]:
            return _additive(allowed, dtype)
        before = torch.cat([self.mask.cumsum(dim=1) - 1, positions], dim=1)  # (B, C + q)
        sliding = _additive(allowed & (positions[:, :, None] - before[:, None, :] < window), dtype)
        kinds = {"full_attention": _additive(allowed, dtype), "sliding_attention": sliding}
        return kinds if "full_attention" in attention_kinds(self.model) else sliding


@dataclass(frozen=True)
class Replay:
    """B rows whose tokens are computed again for every continuation; fields and methods as `KVCache`'s."""

    model: nn.Module
    mask: Tensor
    lengths: Tensor
    last: Tensor
    ids: Tensor  # right-padded, (B, C) int64

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor, real: Tensor) -> Replay:
        """Compute right-padded rows, (B, C); `real` marks their tokens, (B, C) bool."""
        lengths = real.sum(dim=1)
        return cls(model, real, lengths, _last(_hidden(model, ids), lengths), ids)

    def rows(self, chosen: Tensor) -> Replay:
        """See `KVCache`."""
        return Replay(self.model, self.mask[chosen], self.lengths[chosen], self.last[chosen], self.ids[chosen])

    def look_ahead(self, tokens: Tensor, offsets: Tensor, attends: Tensor) -> Tensor:
        """See `KVCache`; one pass for each new token that no other one attends to."""
        out = self.last[:, None].repeat(1, len(tokens), 1)
        for end in (attends.sum(dim=0) == 1).nonzero()[:, 0].tolist():
            path = attends[end].nonzero()[:, 0]
            path = path[offsets[path].argsort()]
            added = tokens[path].expand(len(self.ids), -1)
            ids, _ = append_tokens(self.ids, self.lengths, added, torch.ones_like(added, dtype=torch.bool))
            hidden = _hidden(self.model, ids)
            places = self.lengths[:, None] + offsets[path]  # (B, p)
            out[:, path] = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return out

    def extend(self, tokens: Tensor, real: Tensor) -> Replay:
        """See `KVCache`."""
        return Replay.of(self.model, *append_tokens(self.ids, self.lengths, tokens, real))


Prefix = KVCache | Replay


def append_tokens(ids: Tensor, lengths: Tensor, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded rows with right-padded tokens after each row's last one, and which columns are real."""
    width = tokens.shape[1]
    longer = torch.cat([ids, ids.new_zeros(len(ids), width)], dim=1)
    longer.scatter_(1, lengths[:, None] + torch.arange(width, device=ids.device), tokens)
    return longer, torch.arange(longer.shape[1], device=ids.device) < (lengths + real.sum(dim=1))[:, None]


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = body(model)(input_ids=ids, use_cache=False)[0]
    return hidden


def _last(hidden: Tensor, counts: Tensor) -> Tensor:
    """Each row's hidden state at its last real column: (B, T, D) -> (B, D)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), counts - 1]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask (B, 1, q, C + q): the one form that Unsloth and every attention of transformers accept."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _layers(cache: Any) -> Layers:  # noqa: ANN401 - a tuple of pairs, or transformers' cache
    return cache if isinstance(cache, tuple) else tuple((layer.keys, layer.values) for layer in cache.layers)
