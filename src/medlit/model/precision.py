"""The number format that a verb computes in when no config names one; the adapter itself stays in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from lightning.pytorch.plugins import MixedPrecision

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_for(device: torch.device, name: str = "auto") -> torch.dtype:
    """Number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def default_precision(on_gpu: bool) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """What `dtype_for` chooses under 'auto', in Lightning's words."""
    dtype = dtype_for(torch.device("cuda" if on_gpu else "cpu"))
    return "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed" if dtype == torch.float16 else "32-true"


def at_default_precision(device: torch.device) -> AbstractContextManager[None]:
    """The context in which Lightning's loops compute at the default precision, for who has no loop."""
    precision = default_precision(device.type == "cuda")
    return nullcontext() if precision == "32-true" else MixedPrecision(precision, device.type).forward_context()
