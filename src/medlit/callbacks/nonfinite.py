"""Optimizer steps whose gradient is not finite: the fit stops, or skips them."""

from typing import Any, Literal

import lightning as L
import torch
from torch.optim import Optimizer

from medlit.callbacks.run_files import run_folder
from medlit.data.collate import Batch
from medlit.errors import UserError

SKIPPED_STEPS = "train/skipped_steps"
# A float16 loss scale of 65,536 falls to 1 in 16 steps that overflow; more overflows have another cause.
MAX_CONSECUTIVE_SKIPS = 20
_MAX_NAMED = 8  # notes in the error message


class NonfiniteGuard(L.Callback):
    """Checks each optimizer step's gradient, of all processes, before it is clipped.

    A loss that is not finite gives a gradient that is not. The norm is computed on the device and fetched once an
    optimizer step, as the logged loss is; no micro-batch waits for it, and neither does the optimizer where the fit
    would stop, before anything is saved. Under float16 the gradient scaler finds its scale by overflowing now and then:
    such a step is skipped by design, whatever the setting. A skipped step leaves weights and optimizer unchanged.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"]) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipped = self.consecutive = 0
        self.ids: list[str] = []
        self._is_finite: torch.Tensor | None = None  # the gradient of a step whose result is not fetched yet

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: int) -> None:
        """Remember the notes of the step."""
        self.ids += batch.ids

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Remove a gradient that is not finite; a UserError if there were too many in a row."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        is_finite = torch.isfinite(norm)
        if self.on_nonfinite == "stop" and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._is_finite = is_finite
            return
        if bool(is_finite):
            self.consecutive = 0
        else:
            self.skipped += 1
            self.consecutive += 1
            if self.consecutive > MAX_CONSECUTIVE_SKIPS:
                raise UserError(self._message(trainer, trainer.global_step + 1))
            optimizer.zero_grad(set_to_none=True)  # optimizers skip weights that have no gradient
        self.ids = []
        if self.skipped:
            pl_module.log(SKIPPED_STEPS, float(self.skipped))

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Stop the fit after a step whose gradient was not finite."""
        if self._is_finite is not None:
            if not bool(self._is_finite):
                raise UserError(self._message(trainer, trainer.global_step))
            self._is_finite, self.ids = None, []

    def _message(self, trainer: L.Trainer, step: int) -> str:
        ids = self.ids
        if trainer.world_size > 1:
            gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self.ids)
            ids = [note_id for of_rank in gathered for note_id in of_rank]
        more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
        several = f", as for the {self.consecutive - 1} steps before it" if self.consecutive > 1 else ""
        last = run_folder(trainer) / "checkpoints" / "last.ckpt"
        checkpoint = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        return (
            f"model.optimizer.on_nonfinite: step {step} (notes {', '.join(ids[:_MAX_NAMED])}{more})"
            f" is not valid, since its gradient is not finite{several}; {checkpoint}: lower"
            " model.optimizer.learning_rate, check the notes, or set this to 'skip'."
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps skipped so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.skipped = state_dict["skipped"]
