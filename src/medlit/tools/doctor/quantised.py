"""What a fit asks of bitsandbytes, done once and small: an NF4 layer forward and backward, a step of 8-bit AdamW."""

from __future__ import annotations

from typing import Any

import torch

# A random NF4 matrix is off by 9 % of its norm, and so is what it is multiplied with.
_LARGEST_ERROR = 0.2
_WIDTH = 128
# Smaller parameters keep their optimizer state in 32 bit.
_SMALLEST_8BIT = 4096


def four_bit(device: torch.device) -> dict[str, Any]:
    """Relative errors of an NF4 layer's output and of its input's gradient.

    Raises:
        ArithmeticError: one is larger than quantisation explains.
    """
    from bitsandbytes.nn import Linear4bit

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    layer = Linear4bit(_WIDTH, _WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4")
    x = torch.randn(32, _WIDTH, dtype=dtype)
    torch.random.set_rng_state(torch_state)
    dense = layer.weight.detach().clone().to(device, dtype)
    layer = layer.to(device)  # quantises
    x = x.to(device).requires_grad_()
    y = layer(x)
    y.sum().backward()
    true, slope = x.detach() @ dense.T, dense.sum(0).expand_as(x)
    errors = {"forward": _relative(y.detach(), true), "backward": _relative(x.grad, slope)}
    for name, error in errors.items():
        if not error < _LARGEST_ERROR:
            raise ArithmeticError(f"the 4-bit {name} pass is off by {error:.0%}, where quantisation explains 9 %")
    return errors


def _relative(found: torch.Tensor | None, true: torch.Tensor) -> float:
    if found is None:
        return float("inf")
    return float((found.float() - true.float()).norm() / true.float().norm())


def optimizer_step(device: torch.device) -> dict[str, Any]:
    """A step of 8-bit AdamW.

    Raises:
        ArithmeticError: it moved the weights otherwise than AdamW does, or kept its state in another format.
    """
    from bitsandbytes.optim import AdamW8bit

    rate = 1e-2
    weight = torch.nn.Parameter(torch.ones(_SMALLEST_8BIT, device=device))
    optimizer = AdamW8bit([weight], lr=rate, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    # AdamW's first step is the learning rate against the gradient's sign.
    moved = float((1 - weight.detach()).mean())
    state = {str(value.dtype) for value in optimizer.state[weight].values() if getattr(value, "ndim", 0) == 1}
    if abs(moved / rate - 1) > 0.01 or "torch.uint8" not in state:
        raise ArithmeticError(f"a step of 8-bit AdamW moved the weights by {moved:g} instead of {rate:g}")
    return {"moved": moved}
