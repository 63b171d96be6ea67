"""The language model behind Unsloth at work: its modes and its loss.

`loading.py` makes it. On a GPU Unsloth patches its classes, on a CPU it is stock transformers and PEFT; what differs
between the two stays in these files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medlit.base_model import PACKED
from medlit.data.collate import Batch
from medlit.model import memory
from medlit.model.settings import LanguageModel, Lora

# Rows of logits held at once: 2,048 x 128,256 in float32 are 1 GiB.
_LOGIT_ROWS = 2048


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def can_pack(model: nn.Module) -> bool:
    """Whether a model takes packed notes as they are: a Llama in half precision on a GPU from Ampere on."""
    inner = causal_lm(model)
    if inner.device.type != "cuda" or inner.config.model_type != PACKED:
        return False
    return torch.cuda.get_device_capability(inner.device) >= (8, 0)


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpointing(language_model: LanguageModel) -> str | bool:
    """What Unsloth is told of recomputation; under 'auto' each micro-batch chooses for itself: see `recomputation`."""
    return "unsloth" if language_model.gradient_checkpointing == "unsloth" else False


def train_mode(model: nn.Module, language_model: LanguageModel) -> None:
    """Dropout, gradient checkpointing and the training kernels on."""
    from unsloth import FastLanguageModel

    model.train()
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing(language_model))


def inference_mode(model: nn.Module) -> None:
    """Dropout and gradient checkpointing off, the generation kernels on."""
    from unsloth import FastLanguageModel

    model.eval()
    FastLanguageModel.for_inference(model)


def make_recomputation(
    model: nn.Module, language_model: LanguageModel, lora: Lora | None
) -> memory.Recomputation | None:
    """What chooses, for each micro-batch, which layers are computed again; None where there is no choice.

    Called when the weights are loaded and nothing has been trained yet.
    """
    inner = causal_lm(model)
    device = inner.device
    if language_model.gradient_checkpointing != "auto" or device.type != "cuda":
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    takes = memory.footprint(inner.config, torch.cuda.memory_allocated(device), trained)
    budget = memory.budget_on(device, language_model.memory_budget_gib)
    return memory.Recomputation(inner.model.layers, takes, budget, random=lora is not None and lora.dropout > 0)


def loss_sum(model: nn.Module, batch: Batch, recomputation: memory.Recomputation | None = None) -> Tensor:
    """Summed negative log-likelihood of a batch's supervised tokens, in nats, float32, shape ().

    The head runs at supervised positions only: an answer of 5 tokens needs 5 rows of logits, not one for each of the
    note's tokens. Without a mask the attention is causal, and right padding lies behind every real token.
    """
    inner = causal_lm(model)
    if batch.starts is not None and not (model.training and can_pack(model)):
        batch = batch.padded()
    if recomputation is not None:
        recomputation.prepare(batch.input_ids.numel())
    hidden = _hidden(inner, batch).flatten(0, 1)  # (B * T, D)
    rows = hidden.index_select(0, batch.places)  # (S, D)
    total = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        if len(rows) > _LOGIT_ROWS and rows.requires_grad:
            total = total + checkpoint(_head_loss, inner, rows[part], batch.targets[part], use_reentrant=False)
        else:
            total = total + _head_loss(inner, rows[part], batch.targets[part])
    return total


def _hidden(inner: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - see causal_lm
    """The last layer's output, (B, T, D)."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.starts is not None:
        # The starts go where nothing but medlit's attention looks. The mask of ones is dropped in training, but without
        # one Unsloth would work out the packing itself, from the positions, and leave its compiled layers for it.
        arguments |= {
            "position_ids": batch.positions,
            "causal_mask": batch.starts,
            "attention_mask": torch.ones_like(batch.input_ids),
        }
    hidden: Tensor = inner.model(**arguments)[0]
    return hidden


def _head_loss(inner: Any, hidden: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401 - see causal_lm
    logits = inner.lm_head(hidden.to(inner.lm_head.weight.dtype)).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    if cap:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    total: Tensor = functional.cross_entropy(logits, targets, reduction="sum")
    return total
