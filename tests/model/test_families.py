"""Packed notes reach the varlen kernel in its shape; everything else goes where it went."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medlit.model.families import route


def by_note(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """What the varlen kernel computes, note by note: (T, heads, D)."""
    out = []
    for start, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def stock(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
    """Unsloth's call for a batch of one length: (B, heads, T, D) to (B, T, heads, D)."""
    return functional.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True).transpose(1, 2)


def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    attend = route(stock, by_note)
    return attend(config=None, context=SimpleNamespace(causal_mask=mask), Q=query, K=key, V=value)


def test_a_packed_note_attends_as_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 21, 8, generator=draw) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 6, 15, 21, 21], dtype=torch.int32)
    together = call(query, key, value, starts)
    assert together.shape == (1, 21, 4, 8)
    for start, end in ((0, 5), (5, 6), (6, 15), (15, 21)):
        alone = call(*(x[:, :, start:end] for x in (query, key, value)), None)
        assert torch.allclose(together[:, start:end], alone, atol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6)])
def test_unpacked_batches_use_the_stock_attention(mask: Tensor | None) -> None:
    query, key, value = (torch.randn(3, heads, 6, 8) for heads in (4, 2, 2))
    ours = call(query, key, value, mask)
    assert torch.equal(ours, stock(config=None, context=None, Q=query, K=key, V=value))
