"""Steps whose gradient is not a finite number: the fit stops there, or goes on without them."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from medlit.callbacks.run_folder import run_folder
from medlit.errors import UserError

SKIPPED_STEPS = "train/skipped_steps"
# A float16 loss scale of 65,536 is at 1 after 16 steps that overflow; whatever overflows then is no matter of scale.
MOST_IN_A_ROW = 20
_NAMED = 8


class FiniteSteps(L.Callback):
    """Looks at each optimizer step's gradient, of all processes, before it is clipped and applied.

    A loss that is not finite makes a gradient that is not. The norm is computed on the device and fetched once an
    optimizer step, as the loss is for the log; no micro-batch waits for it. Under float16 the loss scale is found by
    overflowing now and then: such a step is left out by design and counts as skipped, whatever the setting.

    Args:
        on_nonfinite: 'stop', or 'skip', which leaves weights and optimizer as they are and goes on with the next step.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"]) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipped = self.in_a_row = 0
        self.ids: list[str] = []
        self.supervised = True

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - medlit's Batch
        batch_idx: int,
    ) -> None:
        """Note whose step it is."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.ids = []
        self.ids += batch.ids
        self.supervised = batch.step_tokens > 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look, and take the gradient away where the step must not be.

        Raises:
            UserError: the fit is to stop at such a step, or had too many one after another.
        """
        if bool(torch.isfinite(gradient_norm(pl_module))):
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if (self.on_nonfinite == "stop" and not scaled) or self.in_a_row > MOST_IN_A_ROW:
                raise UserError(self._told(trainer))
            optimizer.zero_grad(set_to_none=True)  # a weight without a gradient is passed over
        if self.skipped:
            pl_module.log(SKIPPED_STEPS, float(self.skipped))

    def _told(self, trainer: L.Trainer) -> str:
        ids = self.ids
        if trainer.world_size > 1:
            parts: list[list[str]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.ids)
            ids = [one for part in parts for one in part]
        named = ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
        what = "its gradient is not finite" if self.supervised else "it has no supervised token"
        several = f", as for the {self.in_a_row - 1} steps before it" if self.in_a_row > 1 else ""
        last = run_folder(trainer) / "checkpoints" / "last.ckpt"
        good = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        return (
            f"model.optimizer.on_nonfinite: step {trainer.global_step + 1} (notes {named}) cannot be taken, since"
            f" {what}{several}; {good}: lower model.optimizer.learning_rate, look at the notes, or set this to 'skip'."
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps skipped so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.skipped = state_dict["skipped"]


def gradient_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all gradients, on their device, shape ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
