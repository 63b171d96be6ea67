"""Checkpoint files: written whole, and read without running what a stranger may have put into them.

A checkpoint is a zip archive with a pickle in it. `weights_only=True` rebuilds tensors and plain values and refuses
everything else; what it does not ask is how large the archive's entries become when they are unpacked.
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


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own way to write, but beside the old file and renamed at the end.

    Lightning 2.6.6 writes to the system's folder for temporary files and moves the file from there, which on another
    file system is a copy over the old checkpoint: a process that is killed in the middle leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint, readable by its owner alone.

        Raises:
            UserError: the disk is full, the folder closed, or the weights are no numbers; the file is as it was before.
        """
        if broken := _not_finite(checkpoint):
            raise UserError(
                f"{path} is not written, since {len(broken)} weights after step {checkpoint['global_step']}, such as"
                f" {broken[0]}, are not finite numbers; lower model.optimizer.learning_rate and go on from an earlier"
                " checkpoint."
            )
        # PyTorch's own writer hides what the disk answered.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as beside:
            beside.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, on the host; whatever is asked for, no code in it is run."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values, on the host.

    Raises:
        UserError: the file is damaged, no checkpoint, holds code or more than it shows, or weights that are no numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise _no_checkpoint(path) from error
    if packed:
        # PyTorch packs nothing, and reads an entry before it judges it: a few bytes may unpack to more than fits.
        raise UserError(f"ckpt_path: {path} holds compressed entries, which no checkpoint has; take another one.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        broken = _not_finite({"state_dict": checkpoint["state_dict"]})
    except Exception as error:  # whatever a file that is no checkpoint makes the unpickler raise
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"ckpt_path: {path} holds code beside its weights, which medlit does not run; take one that medlit"
                " wrote."
            ) from error
        raise _no_checkpoint(path) from error
    if broken:
        raise UserError(
            f"ckpt_path: {len(broken)} weights in {path}, such as {broken[0]}, are not finite numbers; take an earlier"
            " checkpoint."
        )
    return checkpoint  # type: ignore[no-any-return]


def _not_finite(checkpoint: dict[str, Any]) -> list[str]:
    return [name for name, value in checkpoint.get("state_dict", {}).items() if not bool(torch.isfinite(value).all())]


def _no_checkpoint(path: Path) -> UserError:
    return UserError(
        f"ckpt_path: {path} is cut short, damaged or not a checkpoint; take another one, such as 'best' or 'last'."
    )
