"""Where temperatures are kept: with the adapter, in `medlit.json`, one for each way of answering.

A fit that answers with probabilities saves its validation's temperature with the checkpoint and the adapter. `medlit
validate` finds one afterwards, for any other way of answering, and adds it to the adapter that it measured: the one
that `model.adapter` names, or the one beside the `best` checkpoint. It does so after a whole validation on the
adapter's own notes.
"""

from __future__ import annotations

import json
import stat
from dataclasses import asdict
from pathlib import Path

from medlit.atomic_io import write_json
from medlit.model.adapter_metadata import LABELS_FILE, AdapterMetadata
from medlit.model.settings import Decoding
from medlit.run_folder import run_of

# Settings that change no probability.
_ASIDE = ("max_new_tokens", "stop_early", "abstain_below")


def decoding_key(decoding: Decoding) -> str:
    """The decoding settings that a temperature belongs to, as a key."""
    return ", ".join(f"{name}={value}" for name, value in asdict(decoding).items() if name not in _ASIDE)


def metadata_of_weights(checkpoint: str | Path | None, adapter: str | None) -> Path | None:
    """`medlit.json` of the adapter folder whose weights a verb uses, or None when they lie in a checkpoint alone."""
    folder = None if adapter is None else Path(adapter).expanduser()
    if checkpoint is not None:
        run = run_of(Path(checkpoint)) if Path(checkpoint).name == "best.ckpt" else None
        folder = None if run is None else run / "adapter"
    file = None if folder is None else folder / LABELS_FILE
    return file if file is not None and file.is_file() else None


def keep_temperatures(file: Path, temperatures: dict[str, float]) -> None:
    """Add temperatures to an adapter's `medlit.json`, which keeps its mode: an adapter may be shared.

    Raises:
        UserError: the file is damaged, or its folder is full or closed.
    """
    AdapterMetadata.read(file)  # it is medlit's, or this is where it is said
    values = json.loads(file.read_text(encoding="utf-8"))
    values["temperatures"] = values.get("temperatures", {}) | temperatures
    mode = stat.S_IMODE(file.stat().st_mode)
    write_json(file, values)
    file.chmod(mode)
