"""Logits are a float32 product whatever the format of the weights."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_model
from torch import nn

from medlit.model.head import head_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_logits_in_float32(dtype: torch.dtype) -> None:
    """Rounded to bfloat16, logits of two digits are multiples of 1/16, and the likeliest tokens often tie."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 9_000, bias=False)  # more tokens than are computed at once
    head.weight = nn.Parameter(torch.randn(9_000, 64, generator=generator))
    model.set_output_embeddings(head)  # type: ignore[operator]
    model.to(dtype)
    hidden = torch.randn(3, 64, generator=generator).to(dtype)
    with torch.no_grad():
        found = head_logits(model, hidden)
    torch.testing.assert_close(found, hidden.float() @ head.weight.float().t(), rtol=1e-5, atol=1e-4)
