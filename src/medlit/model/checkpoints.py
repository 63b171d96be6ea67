"""Checkpoint files: written atomically, and read without running code that they may contain.

A checkpoint is a zip archive with a pickle in it. `weights_only=True` rebuilds tensors and plain values and refuses
everything else, but does not limit how large the archive's entries become when they are unpacked.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from medlit.atomic_io import atomic_write
from medlit.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and renames at the end.

    Lightning 2.6.6 writes to the system's temporary folder and moves the file from there, which on another file system
    is a copy over the old checkpoint: a process that is killed meanwhile leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint, readable by its owner alone.

        Raises:
            UserError: the disk is full, the folder is read-only, or a weight is not finite; the old file is unchanged.
        """
        if broken := _not_finite(checkpoint):
            raise UserError(
                f"{path} is not written, since {len(broken)} weights after step {checkpoint['global_step']}, such as"
                f" {broken[0]}, are not finite numbers; lower model.optimizer.learning_rate and resume from an earlier"
                " checkpoint."
            )
        # PyTorch's writer hides the disk's error.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as beside:
            beside.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint on the host; code in it is never run, whatever `weights_only` says."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values on the host.

    Raises:
        UserError: the file is damaged, not a checkpoint, holds code or compressed entries, or a weight is not finite.
    """
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
            raise UserError(
                f"ckpt_path: {path} holds code beside its weights, which medlit does not run; use one that medlit"
                " wrote."
            ) from error
        raise _no_checkpoint(path) from error
    if broken:
        raise UserError(
            f"ckpt_path: {len(broken)} weights in {path}, such as {broken[0]}, are not finite numbers; use an earlier"
            " checkpoint."
        )
    return checkpoint  # type: ignore[no-any-return]


def _not_finite(checkpoint: dict[str, Any]) -> list[str]:
    return [name for name, value in checkpoint.get("state_dict", {}).items() if not bool(torch.isfinite(value).all())]


def _no_checkpoint(path: Path) -> UserError:
    return UserError(
        f"ckpt_path: {path} is truncated, damaged or not a checkpoint; use another one, such as 'best' or 'last'."
    )
