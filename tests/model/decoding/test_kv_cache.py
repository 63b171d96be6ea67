"""Prompts that are read end to end: what the cache holds; whole decoders are in test_decoding.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import left_padded
from torch import Tensor
from transformers import LlamaConfig

from medlit.model.decoding.kv_cache import KVCache, read_prompts
from medlit.model.packing import MULTIPLE, PACKS


class Echo:
    """A body whose hidden states, keys and values are each token's id and position; it counts what it computes."""

    config = LlamaConfig(num_hidden_layers=1)

    def __init__(self) -> None:
        setattr(self, PACKS, True)
        self.computed = 0

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
        self.computed = input_ids.numel()
        hidden = torch.stack([input_ids, position_ids], dim=2).float()  # (1, T, 2)
        return hidden, ((hidden[:, None], -hidden[:, None]),)


@given(st.lists(st.lists(st.integers(5, 9), max_size=12), min_size=1, max_size=6), st.integers(1, 8))
def test_prompts_read_end_to_end_fill_the_cache_as_padded_ones(rests: list[list[int]], shared: int) -> None:
    rows = [[*range(20, 20 + shared), *rest] for rest in rests]
    inner = Echo()
    cache = read_prompts(SimpleNamespace(base_model=inner, config=inner.config), left_padded(rows))  # type: ignore[arg-type]
    assert isinstance(cache, KVCache)
    ((keys, values),) = cache.layers
    assert keys.shape == (len(rows), 1, max(map(len, rows)), 2)
    assert torch.equal(values, -keys)
    for row, own, real, last in zip(rows, keys[:, 0], cache.mask, cache.last, strict=True):
        expected = torch.tensor([[token, place] for place, token in enumerate(row)]).float()
        assert torch.equal(own[real], expected)
        assert torch.equal(last, expected[-1])
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert inner.computed <= sum(map(len, rows)) - (len(rows) - 1) * shared + MULTIPLE - 1
