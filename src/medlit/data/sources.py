"""Where notes come from: `builtin`, a table's file, a folder of them, a glob, or `owner/name[:configuration]` (Hub).

Each becomes a dictionary from split name (`train`, `validation`, `test`; `all` for a table that has no splits) to its
tables, with all their columns.
"""

import glob
import os
import re
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import ClassLabel, Dataset
from huggingface_hub import is_offline_mode

from medlit.data.readers import KINDS, read_file, table_name
from medlit.data.settings import Columns
from medlit.errors import NotCachedError, UserError

ALL = "all"
_BUILTIN = Path(__file__).with_name("builtin")  # invented notes; `benchmarks/builtin_notes.py` writes them
SPLITS = ("train", "validation", "test")

_ALIASES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
_SHARD = re.compile(r"[-_.]\d+(-of-\d+)?$")  # train-00000-of-00002.parquet
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[^<>:/\\|?*]+)?", re.ASCII)
# How `datasets` lists the configurations of a dataset, on the Hub and in its cache.
_CONFIGURATIONS = re.compile(r"(?:available(?: configs)?|configs in the cache): \[(.+?)\]|in the cache: (.+)", re.I)
_UNREADABLE = re.compile(r"datasets dtype|scripts are no longer supported|data files found")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class RawTable(NamedTuple):
    """One table with all its columns, memory-mapped, and its name in error messages."""

    name: str
    rows: Dataset

    def classes(self, column: str) -> list[str] | None:
        """Names behind the numbers of a `ClassLabel` column or of lists of these, as Hub datasets have; else None."""
        feature = self.rows.features[column]
        feature = getattr(feature, "feature", feature)
        return list(feature.names) if isinstance(feature, ClassLabel) else None


def as_text(values: list[Any], classes: list[str] | None) -> list[str | None]:
    """Values of a column as text, class ids as their names; NaN, an infinity and an id without a name are null."""
    if classes is not None:
        return list(map(dict(enumerate(classes)).get, values))
    missing = (value is None or (isinstance(value, float) and not isfinite(value)) for value in values)
    return [None if is_missing else str(value) for value, is_missing in zip(values, missing, strict=True)]


def cell_labels(values: list[Any], classes: list[str] | None, separator: str | None) -> list[list[str]]:
    """The labels of each cell as the table writes them: of a list, of a text with separators, or one; maybe none."""
    cells = []
    for value in values:
        labels = as_text(value if isinstance(value, list) else [value], classes)
        parts = [part for label in labels for part in ((label or "").split(separator) if separator else [label])]
        cells.append([part for part in parts if part and part.strip()])
    return cells


def read_tables(source: str, revision: str | None, columns: Columns) -> dict[str, list[RawTable]]:
    """Read a source with all its columns: split name -> its tables, one for each file; a UserError if it cannot."""
    path = _BUILTIN if source == "builtin" else Path(source).expanduser()
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # as `save_to_disk` writes them
        raise UserError(f"data.source: {path} is a saved dataset; write `dataset.to_parquet(...)` and give that.")
    if path.is_file():
        return {ALL: [RawTable(str(path), read_file(path, columns))]}
    if path.exists() or any(mark in source for mark in "*?["):
        return _several(path, columns)
    if not is_hub_id(source):
        raise UserError(f"data.source: there is no file or folder {source} (looked from {Path.cwd()}).")
    return _hub(source, revision)


def reads(source: str, file: Path) -> bool:
    """Whether a source reads a file, however the two are spelled or linked, or would read it if it existed."""
    path, target = Path(source).expanduser(), Path(os.path.realpath(file))
    if path.is_dir():
        found, is_named = list(path.iterdir()), target.parent == path.resolve()
    else:
        found = [path] if path.exists() else [Path(name) for name in glob.glob(str(path), recursive=True)]
        is_named = target.match(os.path.realpath(path))
    return is_named or (target.exists() and any(each.exists() and each.samefile(target) for each in found))


def is_hub_id(source: str) -> bool:
    """Whether the name of something that is not here may be a Hub id: it is no path and has no table's suffix."""
    return _HUB_ID.fullmatch(source) is not None and not table_name(Path(source))[1]


def public_name(source: str) -> str:
    """A data source or model as others may see it: a Hub id, or the last part of a path."""
    path = Path(source).expanduser()
    return source if is_hub_id(source) and not path.exists() else path.name


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test` for a file's stem or a split's name that means it, else None."""
    name = _SHARD.sub("", name.lower())
    return name if name in SPLITS else _ALIASES.get(name)


def _several(path: Path, columns: Columns) -> dict[str, list[RawTable]]:
    """Read the tables in a folder, or the files of a glob, by split; those of a glob may be named after none."""
    found = sorted(path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    listed = (each for each in found if not each.is_dir() and (table_name(each)[1] or not path.is_dir()))
    files = {file: split_of(table_name(file)[0]) or ALL for file in listed}
    for each in found:
        if each in files and not each.is_file():
            raise UserError(f"data.source: {each} is no regular file, or a link to none; put one in its place.")
        inner = () if each.name.startswith((".", "_")) else each.glob("[!.]*")  # nothing in a file
        tables = [file for file in inner if table_name(file)[1] and file not in files]
        apart = tables if not files or "=" in each.name or split_of(each.stem) else ()
        if apart or any(split_of(table_name(file)[0]) for file in tables):
            remedy = "move it away or its tables up, or give a glob of just the files to read"
            raise UserError(f"data.source: the tables in the folder {each} would not be read; {remedy}.")
    if not files:
        fault = f"the folder {path} holds no table ({KINDS})" if path.is_dir() else f"no file matches {path}"
        raise UserError(f"data.source: {fault} (looked from {Path.cwd()}).")
    unnamed = [file.name for file, split in files.items() if split == ALL]
    if unnamed and (path.is_dir() or len(unnamed) < len(files)):
        raise UserError(
            f"data.source: {unnamed[0]}, one of the files of {path}, names no split; call all files"
            " train, validation and test, or give one file or a glob that matches no split's file."
        )
    chosen = {split: same for split in (*SPLITS, ALL) if (same := [file for file in files if files[file] == split])}
    for split, same in chosen.items():
        if split != ALL and len(same) > 1 and not all(_SHARD.search(table_name(file)[0]) for file in same):
            named = f"{same[0]} and {same[1]} are both named after the {split} split"
            raise UserError(f"data.source: {named}; rename one, or move it away.")
        parts = [(int(n), int(of)) for file in same for n, of in re.findall(r"(\d+)-of-(\d+)$", table_name(file)[0])]
        if parts and path.is_dir() and {len(same), len({*parts})} != {of for _, of in parts}:  # a glob may name some
            fault = f"the {split} files of {path} are not the parts that their names count"
            raise UserError(f"data.source: {fault} (-00000-of-{max(parts)[1]:05}); keep one file for each part.")
    return {split: [RawTable(str(file), read_file(file, columns)) for file in own] for split, own in chosen.items()}


def _hub(source: str, revision: str | None) -> dict[str, list[RawTable]]:
    """A dataset of the Hugging Face Hub, from the cache when the machine is offline."""
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, revision=revision)
    except Exception as error:  # the Hub's clients raise a dozen unrelated classes for "not there" and "not reachable"
        raise _hub_fault(error, source, revision) from error
    # Offline, `datasets` returns the newest commit that is cached.
    commit = commit_of(loaded.values())
    if revision and _COMMIT.fullmatch(revision) and commit not in (None, revision):
        raise UserError(
            f"data.revision: the cache holds {source} at {commit}, not at {revision}; fetch that revision with"
            f" `HF_HUB_OFFLINE=0 medlit audit --data.source {source} --data.revision {revision}`."
        )
    name = f"the Hub dataset {source}"
    if len(loaded) == 1 and split_of(next(iter(loaded))) is None:
        return {ALL: [RawTable(name, next(iter(loaded.values())))]}
    tables = {split_of(str(given)): [RawTable(f"{name}, split {given}", rows)] for given, rows in loaded.items()}
    if None in tables or len(tables) < len(loaded):
        given = ", ".join(map(str, loaded))
        raise UserError(f"data.source: {name} has the splits {given}; medlit reads train, validation, test, each once.")
    return {split: tables[split] for split in SPLITS if split in tables}


def _hub_fault(error: Exception, source: str, revision: str | None) -> UserError:
    """What keeps a Hub dataset from being read; `datasets` has one class for several causes, so its text decides."""
    name, _, configuration = source.partition(":")
    text, reason = str(error), type(error).__name__
    if found := _CONFIGURATIONS.search(text):
        names = re.sub(r"[' ]", "", found[1] or found[2]).split(",")
        fault = f"no configuration {configuration!r}, only" if configuration else "several configurations:"
        listed = f"{fault} {', '.join(names)}"
        return UserError(f"data.source: the Hub dataset {name} has {listed}; name one, such as {name}:{names[0]}.")
    if "gated dataset" in text or reason == "GatedRepoError":
        return UserError(
            f"data.source: the Hub dataset {name} is gated; accept its licence at https://huggingface.co/datasets/{name}"
            " and set HF_TOKEN to a token of the same account."
        )
    if isinstance(error, datasets.exceptions.DatasetGenerationError) or _UNREADABLE.search(text):
        return UserError(
            f"data.source: the files of the Hub dataset {name} cannot be read as one table ({reason}); download them"
            " and give one of them as data.source."
        )
    at, option = (f" at revision {revision}", f" --data.revision {revision}") if revision else ("", "")
    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else reason
    return NotCachedError(
        f"data.source: {source} is not a file here, and as a Hub dataset{at} it is neither cached nor reachable"
        f" ({reason}); correct the name, set HF_TOKEN if it is private, or fill the cache on a machine with a network"
        f" by `HF_HUB_OFFLINE=0 medlit audit --data.source {source}{option}`."
    )


def commit_of(tables: Iterable[Dataset]) -> str | None:
    """The commit that the tables of a Hub dataset were read at; None for tables from elsewhere."""
    urls = [url for rows in tables for url in rows.info.download_checksums or {} if url.startswith("hf://")]
    return next((commit for url in sorted(urls) for commit in _COMMIT.findall(url)), None)
