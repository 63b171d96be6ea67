"""The number format that a verb computes in when no config names one; the adapter itself stays in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from lightning.pytorch.plugins import MixedPrecision


def default_precision(on_gpu: bool) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """bfloat16 from Ampere on, float16 before, float32 on a CPU; in Lightning's words."""
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def at_default_precision(device: torch.device) -> AbstractContextManager[None]:
    """The context in which Lightning's loops compute at the default precision, for who has no loop."""
    precision = default_precision(device.type == "cuda")
    return nullcontext() if precision == "32-true" else MixedPrecision(precision, device.type).forward_context()
