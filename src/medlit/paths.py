"""The version, paths that users give, and the folder of medlit's cache (weights, kernels, no notes)."""

import os
import re
from pathlib import Path

from medlit.errors import UserError

__version__ = "0.2.0"


def local_path(setting: str, path: str | Path) -> Path:
    """A path that a setting names, with `~` and variables replaced; a UserError for a URL, which would be a folder."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if re.match(r"[A-Za-z][\w+.-]+:/", expanded):
        url = re.sub(r"^([^/]+:/)(?!/)", r"\1/", expanded)  # a Path has lost a slash
        raise UserError(f"{setting}: {url} is a URL, and medlit writes to local folders only; name one of these.")
    return Path(expanded)


def cache_dir() -> Path:
    """The folder of medlit's cache, made on first use.

    `$MEDLIT_CACHE`, else `$XDG_CACHE_HOME/medlit`, else `~/.cache/medlit`. A folder that medlit makes is readable by
    its owner alone; an existing one keeps its mode. Notes are cached elsewhere, in the cache of `datasets`: see
    `medlit.data.cache.cache_folder`. Raises a UserError if the folder cannot be made, or is a URL.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = local_path("MEDLIT_CACHE", os.environ.get("MEDLIT_CACHE") or f"{caches}/medlit")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"MEDLIT_CACHE: the cache folder {folder} cannot be made ({error.strerror}); set it to a writable one."
        ) from error
    return folder
