"""Checkpoint files: written atomically, and read without running code that they may contain.

The second half repairs the progress of a fit that resumes. Lightning 2.6.6 counts micro-batches: with another number of
devices or `data.batching.micro_batch_size` an epoch would end too early or too late; after a validation at an epoch's
last step one stray micro-batch of it would follow; and a checkpoint made before its step's validation would resume
without it. An optimizer step is the same in every case, so progress is recomputed from the steps.
"""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from medlit.atomic_io import atomic_write
from medlit.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and renames at the end.

    Lightning 2.6.6 moves the file from the system's temporary folder, which may be a copy over the old checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint; a UserError, and the old file, if it cannot be written or a weight is not finite."""
        if broken := _not_finite(checkpoint):
            raise UserError(
                f"{path} is not written, since {len(broken)} weights after step {checkpoint['global_step']}, such as"
                f" {broken[0]}, are not finite numbers; lower model.optimizer.learning_rate and resume from an earlier"
                " checkpoint."
            )
        content = io.BytesIO()  # as PyTorch's writer hides the disk's error
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint on the host; code in it is never run, whatever `weights_only` says."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values on the host; a UserError for a file that is not safe or whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise _no_checkpoint(path) from error
    if packed:
        # PyTorch compresses nothing and unpacks before it checks: a few bytes may expand to more than fits in memory.
        raise UserError(f"ckpt_path: {path} holds compressed entries, which checkpoints do not have; use another one.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        broken = _not_finite({"state_dict": checkpoint["state_dict"]})
    except Exception as error:  # the unpickler raises any class for a file that is not a checkpoint
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(f"ckpt_path: {path} holds code, which medlit does not run; use another one.") from error
        raise _no_checkpoint(path) from error
    if broken:
        found = f"{len(broken)} weights in {path}, such as {broken[0]}, are not finite numbers"
        raise UserError(f"ckpt_path: {found}; use an earlier checkpoint.")
    return checkpoint  # type: ignore[no-any-return]


def _not_finite(checkpoint: dict[str, Any]) -> list[str]:
    return [name for name, value in checkpoint.get("state_dict", {}).items() if not bool(torch.isfinite(value).all())]


def _no_checkpoint(path: Path) -> UserError:
    return UserError(f"ckpt_path: {path} is truncated, damaged or not a checkpoint; use another, such as 'best'.")


def check_progress(checkpoint: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Raise a UserError unless a checkpoint holds the progress, in whole numbers, that Lightning takes unchecked."""
    loops, optimizers, schedules = (checkpoint.get(key) for key in ("loops", "optimizer_states", "lr_schedulers"))
    theirs = (loops.get("fit_loop") if isinstance(loops, dict) else None, checkpoint.get("global_step"))
    pairs = zip((*theirs, checkpoint.get("epoch")), (ours, 0, 0), strict=True)
    is_whole = all(_same_structure(*pair) for pair in pairs)
    if not (is_whole and _one_state(optimizers, "param_groups") and _one_state(schedules)):
        raise UserError(
            f"ckpt_path: {path} lacks the progress of its fit, which medlit's own checkpoints hold; start a new fit"
            " from its run's adapter (--model.adapter), or use another one."
        )


def _one_state(states: object, key: str = "base_lrs") -> bool:
    """Whether there is exactly one state, of one optimizer or schedule, with a list of its groups."""
    one = states[0] if isinstance(states, list) and len(states) == 1 else None
    return isinstance(one, dict) and isinstance(one.get(key), list) and len(one[key]) > 0


def _same_structure(theirs: object, ours: object) -> bool:
    """Whether two states have the same keys and types; numbers are whole and not negative."""
    if isinstance(ours, dict):
        if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
            return False
        return all(_same_structure(theirs[k], ours[k]) for k in ours)
    return type(theirs) is type(ours) and (not isinstance(theirs, int) or theirs >= 0)


def set_step(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Give an evaluation its checkpoint's step, for curves and figures; Lightning (2.6.6) leaves it at 0."""
    step = checkpoint.get("global_step")
    if isinstance(step, int):
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        loop._batches_that_stepped = step


def repair_progress(
    checkpoint: dict[str, Any], steps_per_epoch: int, micro_batches: int, validate_every: int, last: int
) -> bool:
    """Rewrite a checkpoint's progress in place; returns whether the validation of its step is still due.

    `checkpoint` is as Lightning read it, before its loops load it; a step accumulates `micro_batches` in each process,
    here and now; validations are `validate_every` steps apart and after the fit's `last` step.
    """
    step = int(checkpoint["global_step"])
    loop = checkpoint["loops"]["fit_loop"]
    batches, validation = loop["epoch_loop.batch_progress"], loop["epoch_loop.val_loop.batch_progress"]
    # Made at the end of a micro-batch or at the start of a validation, not after it.
    before = batches["total"]["completed"] < batches["total"]["started"] or validation["current"]["completed"] == 0
    due = before and step > 0 and (step >= last or step % validate_every == 0)
    epochs, steps = divmod(step, steps_per_epoch)
    if due and steps == 0:
        epochs, steps = epochs - 1, steps_per_epoch  # the validation belongs to the epoch that ends with it
    batches["total"] = dict.fromkeys(batches["total"], step * micro_batches)
    batches["current"] = dict.fromkeys(batches["current"], steps * micro_batches)
    batches["is_last_batch"] = False
    # Lightning recognises an interrupted validation by a started and unfinished batch; it restarts with the first.
    validation["total"] = {"ready": int(due), "started": int(due), "processed": 0, "completed": 0}
    if due:
        validation["current"] = dict.fromkeys(validation["current"], 0)
    # An epoch in progress is started and not processed; at an epoch's end the next one is not started yet.
    begun = epochs + (steps > 0)
    progress = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    loop["epoch_progress"] |= {"total": dict(progress), "current": dict(progress)}
    return due


def last_step(max_steps: int, max_epochs: int | None, steps_per_epoch: int) -> int:
    """A fit's last optimizer step, from max_steps and max_epochs; 2^63 - 1 where there is none."""
    ends = max_steps, -1 if max_epochs is None else max_epochs * steps_per_epoch
    return min((end for end in ends if end >= 0), default=sys.maxsize)
