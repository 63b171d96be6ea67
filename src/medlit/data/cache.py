"""The cache that the text of notes lies in, and the names of what lies there."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from medlit.errors import UserError


def cache_key(*parts: object) -> str:
    """Key of a cached table: 32 hexadecimal digits of everything that it depends on."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """Where the text of notes is kept: in the cache of `datasets`, a folder that nobody but its owner may enter.

    The files in it are as open as `datasets` makes them. What was fetched from the Hub is not copied here: `datasets`
    must find it again offline.

    Raises:
        UserError: the folder cannot be made, or is somebody else's.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "medlit"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE: {folder} cannot be made readable by you alone ({error.strerror}), as notes must be;"
            " set HF_DATASETS_CACHE to a folder of your own."
        ) from error
    return folder
