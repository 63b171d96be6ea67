"""What a Python user asks of `SpecialtyPredictor`, checked where the command line's types and tables would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch

from medlit.data.notes import clean_note
from medlit.errors import UserError
from medlit.model.settings import Decoding, check_decoding

Mode = Literal["generate", "constrained", "likelihood"]


def texts_of(notes: Iterable[str]) -> list[str]:
    """The notes as they are read from a table.

    Raises:
        UserError: one is empty or no text; it is named by its place.
    """
    if isinstance(notes, str | bytes):
        raise UserError("notes: give a list of texts, or of one text for a single note.")
    texts = []
    for place, note in enumerate(notes):
        if not isinstance(note, str):
            raise UserError(f"notes[{place}]: must be a text, not {type(note).__name__}; leave it out or fill it in.")
        text = clean_note(note)
        if not text:
            raise UserError(f"notes[{place}]: the note is empty; leave it out or fill it in.")
        texts.append(text)
    return texts


def check_settings(decoding: Decoding, max_length: int | None, batch_size: int, token_budget: int | None) -> None:
    """Check what the command line's types and `medlit.cli.validation` do.

    Raises:
        UserError: naming the setting.
    """
    if decoding.mode not in get_args(Mode):
        raise UserError(f"mode: must be one of {', '.join(get_args(Mode))}, not {decoding.mode!r}.")
    check_decoding(decoding)
    counts = {
        "max_new_tokens": decoding.max_new_tokens,
        "max_length": max_length,
        "batch_size": batch_size,
        "token_budget": token_budget,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name}: must be at least 1, not {count}.")


def device_of(wanted: str | torch.device | None) -> torch.device:
    """Where to compute; None is the GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device: there is no {wanted!r}; give 'cpu' or 'cuda', or leave it out.") from error
    if device.type == "cpu":
        return device
    index = device.index or 0
    if device.type != "cuda" or index >= count:
        raise UserError(
            f"device: medlit cannot compute on {wanted}, and PyTorch sees {count} GPUs; give 'cpu', or leave it out."
        )
    return torch.device("cuda", index)
