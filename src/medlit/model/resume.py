"""Where a fit goes on: Lightning's progress, worked out anew from the optimizer steps that a checkpoint has seen.

Lightning counts micro-batches, and two things come of that (2.6.6). A checkpoint of another number of devices or of
another `data.batch_size` has counted micro-batches of another size, so its epoch would end too early or too late. And
a checkpoint that a validation made at an epoch's last step resumes with one stray micro-batch of the finished epoch,
unless that step is a multiple of the validation interval: the epoch loop believes that it still has to validate. An
optimizer step is the same in every case.
"""

from __future__ import annotations

from typing import Any


def count_in_steps(checkpoint: dict[str, Any], steps_per_epoch: int, micro_batches: int) -> None:
    """Rewrite a checkpoint's progress in place.

    Args:
        checkpoint: as Lightning read it, before its loops do.
        steps_per_epoch: optimizer steps of an epoch.
        micro_batches: micro-batches that each process accumulates in a step, here and now.
    """
    step = int(checkpoint["global_step"])
    epochs, steps = divmod(step, steps_per_epoch)
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    batches["total"] = dict.fromkeys(batches["total"], step * micro_batches)
    batches["current"] = dict.fromkeys(batches["current"], steps * micro_batches)
    batches["is_last_batch"] = False
    # An epoch that is under way has begun and is not done; at an epoch's end the next one is still to begin.
    begun = epochs + (steps > 0)
    progress = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    loop["epoch_progress"]["total"] = dict(progress)
    loop["epoch_progress"]["current"] = dict(progress)
