"""The mean of the weights over the last steps: answers with that, trains on with the weights themselves.

Lightning's `WeightAveraging` (2.6.6) copies the whole module, frozen 4-bit base and all; only an adapter is trained.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from medlit.callbacks.folder import verb_of


class WeightAverage(L.Callback):
    """Keeps a moving average of the trained weights and puts it into the model for every validation of a fit.

    What is written in and after a validation, the best checkpoint and the adapter, holds the average as its weights
    (Izmailov 2018, arXiv 1803.05407, with weights that fade). Every checkpoint keeps the other half beside them, so
    that a fit goes on with both. Comes before the callbacks that write checkpoints.

    Args:
        decay: what a step leaves of the average so far, 0 to 1; until 1 / (1 - decay) steps the average is the plain
            mean. None: the weights are used as they are.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.steps = 0
        self.swapped = False  # whether the model holds the average, and `other` the weights that are trained
        self.other: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up what a checkpoint kept; an average that is no longer wanted goes."""
        self.other = {name: weight.to(pl_module.device) for name, weight in self.other.items()}
        if self.swapped:
            self._swap(pl_module)
        if self.decay is None:
            self.steps, self.other = 0, {}

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Train the weights themselves."""
        if self.swapped:
            self._swap(pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Take an optimizer step's weights into the average."""
        if self.decay is None or trainer.fit_loop._should_accumulate():
            return
        keep = min(self.decay, self.steps / (self.steps + 1))
        for name, weight in _trained(pl_module).items():
            average = self.other.setdefault(name, torch.zeros_like(weight))
            average.mul_(keep).add_(weight, alpha=1 - keep)
        self.steps += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer with the average."""
        if verb_of(trainer) == "fit" and self.steps and not self.swapped:
            self._swap(pl_module)

    def _swap(self, module: L.LightningModule) -> None:
        for name, weight in _trained(module).items():
            other = self.other[name].clone()
            self.other[name].copy_(weight)
            weight.copy_(other)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Any]:
        """The half that is not in the model."""
        return {"steps": self.steps, "swapped": self.swapped, "other": self.other} if self.steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with both halves."""
        self.steps, self.swapped = state_dict["steps"], state_dict["swapped"]
        self.other = dict(state_dict["other"])


def _trained(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}
