"""Where a fit goes on: Lightning's progress, worked out anew from the optimizer steps that a checkpoint has seen.

Lightning counts micro-batches, and three things come of that (2.6.6). A checkpoint of another number of devices or of
another `data.batching.micro_batch_size` has counted micro-batches of another size, so its epoch would end too early or
too late. A
checkpoint that a validation made at an epoch's last step resumes with one stray micro-batch of the finished epoch,
unless that step is a multiple of the validation interval: the epoch loop believes that it still has to validate. And
one that was made before its step's validation resumes without that. An optimizer step is the same in every case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medlit.errors import UserError


def check_progress(checkpoint: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint counts what Lightning will look for, in whole numbers; it would take anything.

    Args:
        checkpoint: as it was read.
        ours: the fit loop's own state, as Lightning would save it now.
        path: the checkpoint, as a message names it.

    Raises:
        UserError: something is missing, of another kind or strange.
    """
    loops, optimizers, schedules = (checkpoint.get(key) for key in ("loops", "optimizer_states", "lr_schedulers"))
    theirs = loops.get("fit_loop") if isinstance(loops, dict) else None
    counted = _alike(checkpoint.get("global_step"), 0) and _alike(checkpoint.get("epoch"), 0)
    if not (_alike(theirs, ours) and counted and _one_state(optimizers, "param_groups") and _one_state(schedules)):
        raise UserError(
            f"ckpt_path: {path} does not say, as medlit's own checkpoints do, how far its fit was; start anew from its"
            " run's adapter (--model.adapter), or take another one."
        )


def _one_state(states: object, key: str = "base_lrs") -> bool:
    """Whether there is one state, of one optimizer or schedule, with a list of its groups."""
    one = states[0] if isinstance(states, list) and len(states) == 1 else None
    return isinstance(one, dict) and isinstance(one.get(key), list) and len(one[key]) > 0


def _alike(theirs: object, ours: object) -> bool:
    """Whether two states have the same keys and kinds of values; a number is whole and not negative."""
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict) and theirs.keys() == ours.keys() and all(_alike(theirs[k], ours[k]) for k in ours)
        )
    return type(theirs) is type(ours) and (not isinstance(theirs, int) or theirs >= 0)


def repair_progress(
    checkpoint: dict[str, Any], steps_per_epoch: int, micro_batches: int, validate_every: int, last: int
) -> None:
    """Rewrite a checkpoint's progress in place.

    Args:
        checkpoint: as Lightning read it, before its loops do.
        steps_per_epoch: optimizer steps of an epoch.
        micro_batches: micro-batches that each process accumulates in a step, here and now.
        validate_every: optimizer steps between validations.
        last: the fit's last step, which is validated always.
    """
    step = int(checkpoint["global_step"])
    loop = checkpoint["loops"]["fit_loop"]
    batches, validation = loop["epoch_loop.batch_progress"], loop["epoch_loop.val_loop.batch_progress"]
    # Made at the end of a micro-batch or at the beginning of a validation, not after it.
    before = batches["total"]["completed"] < batches["total"]["started"] or validation["current"]["completed"] == 0
    due = before and step > 0 and (step >= last or step % validate_every == 0)
    epochs, steps = divmod(step, steps_per_epoch)
    if due and steps == 0:
        epochs, steps = epochs - 1, steps_per_epoch  # the validation belongs to the epoch that ends with it
    batches["total"] = dict.fromkeys(batches["total"], step * micro_batches)
    batches["current"] = dict.fromkeys(batches["current"], steps * micro_batches)
    batches["is_last_batch"] = False
    # One batch begun and not done is how Lightning knows an interrupted validation; it starts with its first batch.
    validation["total"] = {"ready": int(due), "started": int(due), "processed": 0, "completed": 0}
    if due:
        validation["current"] = dict.fromkeys(validation["current"], 0)
    # An epoch that is under way has begun and is not done; at an epoch's end the next one is still to begin.
    begun = epochs + (steps > 0)
    progress = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    loop["epoch_progress"]["total"] = dict(progress)
    loop["epoch_progress"]["current"] = dict(progress)


def validation_due(checkpoint: dict[str, Any]) -> bool:
    """Whether the validation of a checkpoint's step is still to be done, after `repair_progress`."""
    total = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(total["processed"] < total["started"])


def last_step(max_steps: int, max_epochs: int | None, steps_per_epoch: int) -> int:
    """A fit's last optimizer step, whether steps or epochs are counted; 2^63 - 1 where it has none."""
    ends = [max_steps] if max_steps != -1 else []
    if max_epochs not in (None, -1):
        ends.append(max_epochs * steps_per_epoch)
    return min(ends, default=sys.maxsize)
