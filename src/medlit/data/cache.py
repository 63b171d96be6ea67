"""The Arrow cache of notes: its folder and keys, and the tables that are written to it."""

import hashlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from medlit.errors import UserError

VERSION = 9  # part of every key: raise it when the same notes would be read, split or tokenised differently
Names = tuple[str, ...]
Reader = Callable[..., Iterator[Any]]  # of the rows of a file


def cache_key(*parts: object) -> str:
    """Key of a cached table: 32 hexadecimal digits of everything that it depends on."""
    return hashlib.blake2b(repr((VERSION, *parts)).encode("utf-8", "replace"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """The folder for the text of notes, in the cache of `datasets`; only its owner may enter it.

    What comes from the Hub is not copied here, because `datasets` must find it again offline.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "medlit"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE: {folder} cannot be made private ({error.strerror}), as notes must be; set"
            " HF_DATASETS_CACHE to a folder of your own."
        ) from error
    return folder


def cached_table(path: Path, names: Names, rows: Reader, /, lists: Names = (), **settings: object) -> Dataset:
    """Write what `rows` yields of a file to the Arrow cache, or map what an earlier run wrote.

    Every column holds text, and those in `lists` lists of texts. The settings hold tuples and no lists, which
    `datasets` takes for shards. An error is the one that `rows` raises.
    """
    text, status = Value("string"), path.stat()
    settings |= {"lists": lists} if lists else {}
    stamp = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    try:
        return Dataset.from_generator(
            rows,
            features=Features({name: List(text) if name in lists else text for name in names}),
            cache_dir=str(cache_folder()),
            gen_kwargs={"path": str(path), **settings},
            fingerprint=cache_key(stamp, sorted(settings.items())),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
