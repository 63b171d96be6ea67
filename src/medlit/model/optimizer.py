"""AdamW with 8-bit state and its learning-rate schedule."""

import math

from torch import nn
from torch.optim import Optimizer as TorchOptimizer
from torch.optim.lr_scheduler import LambdaLR

from medlit.model.settings import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> TorchOptimizer:
    """AdamW with 8-bit state over the trained weights."""
    from bitsandbytes.optim import AdamW8bit

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return AdamW8bit(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def make_schedule(optimizer: TorchOptimizer, settings: Optimizer, steps: float) -> LambdaLR:
    """The learning-rate schedule of a fit, one value an optimizer step; without an end it stays constant."""
    from transformers import get_scheduler  # imports PEFT and bitsandbytes: 2 s that --help does without

    name, last = ("constant", None) if steps == math.inf else (settings.schedule, int(steps))
    name = "constant_with_warmup" if name == "constant" else name  # transformers' 'constant' has no warm-up
    schedule: LambdaLR = get_scheduler(name, optimizer, settings.warmup_steps, last)
    return schedule


def apply_settings(optimizer: TorchOptimizer, schedule: LambdaLR, settings: Optimizer) -> None:
    """Give an optimizer that was restored from a checkpoint the rate and decay of the current settings and steps."""
    peak, step = settings.learning_rate, schedule.last_epoch
    schedule.base_lrs = [peak] * len(optimizer.param_groups)
    schedule._last_lr = [peak * share(step) for share in schedule.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group |= {"initial_lr": peak, "lr": rate, "weight_decay": settings.weight_decay}
