"""AdamW with 8-bit state and the course of its learning rate: one place, for the answers and for a head's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer as TorchOptimizer
from torch.optim.lr_scheduler import LambdaLR

from medlit.errors import UserError
from medlit.model.settings import Optimizer

if TYPE_CHECKING:
    from bitsandbytes.optim import AdamW8bit

# 'constant' of transformers' knows no warm-up.
_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def optimizer_for(model: nn.Module, settings: Optimizer) -> AdamW8bit:
    """AdamW over the trained weights, those that LoRA+ lets learn faster in a group of their own.

    LoRA's update is B A, and B starts at zero: B wants larger steps than A (Hayou 2024, arXiv 2402.12354). PEFT's
    `create_loraplus_optimizer` takes bias vectors for B too and keeps a global list of the model's embeddings alive.
    """
    from bitsandbytes.optim import AdamW8bit

    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [], "lr": peak} for peak in _peaks(settings)]
    for name, weight in trained:
        groups[-1 if "lora_B" in name else 0]["params"].append(weight)  # of one group both are the same
    return AdamW8bit(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _peaks(settings: Optimizer) -> list[float]:
    """The highest learning rate of each group of weights: all of them, or under LoRA+ the B matrices in a second."""
    slow, fast = settings.learning_rate, settings.learning_rate * settings.loraplus_ratio
    return [slow] if settings.loraplus_ratio == 1 else [slow, fast]


def check_groups(checkpoint: dict[str, Any], settings: Optimizer) -> None:
    """Refuse to go on with an optimizer whose state would find no place.

    Raises:
        UserError: one of the two fits is of LoRA+ and the other is not.
    """
    theirs = len(checkpoint["optimizer_states"][0]["param_groups"])
    if theirs != len(_peaks(settings)):
        wanted = "1" if theirs == 1 else "what it was then"
        raise UserError(
            f"model.optimizer.loraplus_ratio: a fit goes on with the learning rates that it began with; set it to"
            f" {wanted}, or start anew from the adapter with --model.adapter."
        )


def schedule_for(optimizer: TorchOptimizer, settings: Optimizer, steps: int) -> LambdaLR:
    """The learning rate's course over a fit: every group's share of its peak, optimizer step by optimizer step."""
    from transformers import get_scheduler  # imports PEFT and bitsandbytes: 2 s that --help does without

    schedule: LambdaLR = get_scheduler(
        _NAMES[settings.schedule], optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    return schedule


def follow_settings(optimizer: TorchOptimizer, schedule: LambdaLR, settings: Optimizer) -> None:
    """Give an optimizer that came from a checkpoint the rates and the decay that are set now.

    Loading it brought those of the fit that wrote it, though a flag may say otherwise. Where none does nothing changes,
    to the bit.
    """
    peaks = _peaks(settings)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        rate = group["lr"] * (peak / group["initial_lr"])
        group |= {"initial_lr": peak, "lr": rate, "weight_decay": settings.weight_decay}
    schedule.base_lrs = list(peaks)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
