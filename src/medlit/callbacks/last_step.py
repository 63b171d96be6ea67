"""The last optimizer step is always validated, and so saved."""

from __future__ import annotations

from typing import Any

import lightning as L


class LastStep(L.Callback):
    """Stops the fit after its last optimizer step, which makes Lightning validate there.

    Lightning validates every so many batches, or when `should_stop` is set and it may stop; a fit that merely runs out
    of steps ends without validation unless the interval happens to divide them.
    """

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Recognise the last step, whether steps or epochs are counted."""
        by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        by_epochs = (
            trainer.is_last_batch
            and trainer.max_epochs not in (None, -1)
            and trainer.current_epoch + 1 >= trainer.max_epochs
        )
        if by_steps or by_epochs:
            trainer.should_stop = True
