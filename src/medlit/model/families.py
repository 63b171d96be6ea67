"""What differs between the families of base models: the parts of a model, its head, and whether its attention packs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medlit.base_model import PACKING_FAMILY

# Names of split projections -> the fused layer that Unsloth adapts in their place.
FUSED_TARGETS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def can_pack(model: nn.Module) -> bool:
    """Whether a model's attention takes packed notes: a Llama's on a GPU from Ampere on."""
    inner = causal_lm(model)
    if inner.device.type != "cuda" or inner.config.model_type != PACKING_FAMILY:
        return False
    return torch.cuda.get_device_capability(inner.device) >= (8, 0)


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Apply the output head, soft cap included: hidden states (n, D) -> logits (n, V), float32."""
    inner = causal_lm(model)
    head = inner.lm_head
    hidden = hidden.to(head.weight.dtype)
    plain = not torch.is_grad_enabled() and type(head) is nn.Linear and head.bias is None
    if plain and hidden.is_cuda and hidden.dtype != torch.float32:
        # Rounded to bfloat16, logits of two digits are multiples of 1/16 and often tie.
        logits: Tensor = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
    else:
        logits = head(hidden).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    if cap:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits
