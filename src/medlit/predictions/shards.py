"""The shards of a table of predictions: small Parquet files that processes write while they answer.

They are in a hidden folder beside the table, with the run's resume key. Each appears whole, every few seconds, so a
process that is killed loses only those last seconds. A resumed run may have another number of processes.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from datasets import Dataset

from medlit.atomic_io import atomic_write, link_target, lock, read_json, write_json
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.sources import reads
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder
from medlit.model.adapter_metadata import read_fitted
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import Decoding
from medlit.predictions.table import COLUMNS, FORMATS, SET_COLUMNS, arrow_schema

FLUSH_SECONDS = 5.0  # between two shards of a process
ROWS_PER_PASS = 1_000_000  # of the joined table, some 200 bytes each
_BATCH = 10_000  # notes that become Python objects at a time
_MEMORY_ONLY = ("gradient_checkpointing", "memory_budget_gib", "offload", "batch_tokens")  # change no answer
_KEY_FILE = "resume_key.json"
_LOCK_FILE = ".lock"
_SCHEMA = arrow_schema().insert(0, pa.field("row", pa.int64()))  # the table's, after each row's position in the source


def shard_folder(table: Path) -> Path:
    """The folder of a table's shards."""
    table = link_target(table)
    return table.with_name(f".{table.name}.shards")


def check_table(path: Path, sources: Iterable[str], overwrite: bool) -> None:
    """Raise a UserError if a path is a folder, if a source reads it, or if it exists and may not be replaced."""
    if path.exists() and not path.is_file():
        raise UserError(f"output: {path} is not a file; name a file for the table.")
    if source := next((source for source in sources if reads(source, path)), None):
        raise UserError(f"output: {path} is among the notes of {source}; name a file in another folder.")
    if path.exists() and not overwrite:
        raise UserError(f"output: {path} exists; name another file, or add --overwrite to replace it.")


def lock_table(table: Path) -> TextIO:
    """Claim a table until the returned file is closed; a UserError if another process writes it."""
    shard_folder(table).mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (shard_folder(table) / _LOCK_FILE).open("w")
    lock(file.fileno(), f"output: another 'medlit predict' is writing {table}; name another file, or wait for its end.")
    return file


def find_shards(table: Path) -> list[Path]:
    """The shards of an interrupted run, in the order of process and time; none without its resume key."""
    folder = shard_folder(table)
    return sorted(folder.glob("[!.]*.parquet")) if (folder / _KEY_FILE).exists() else []


def read_resume_key(table: Path) -> "ResumeKey | None":
    """The resume key of an interrupted run; None where there is no such run, or none that this version can read."""
    try:
        return ResumeKey(**read_json(shard_folder(table) / _KEY_FILE))
    except (OSError, ValueError, TypeError):
        return None


def start_shards(table: Path, key: "ResumeKey") -> None:
    """Remove the shards of any earlier run, but not the lock, and store this run's resume key."""
    (folder := shard_folder(table)).mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != _LOCK_FILE:
            path.unlink()
    write_json(folder / _KEY_FILE, asdict(key))


def keep_whole_shards(table: Path) -> list[Path]:
    """Remove damaged shards, which an interruption left, and return the others."""
    for path in find_shards(table):
        try:
            pq.read_table(path, schema=_SCHEMA, partitioning=None, page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            path.unlink()
    return find_shards(table)


def answered_rows(shards: Sequence[Path], notes: int) -> npt.NDArray[np.bool_]:
    """Whether each of N notes is in a shard, (N,)."""
    answered = np.zeros(notes, dtype=np.bool_)
    for path in shards:
        answered[pq.read_table(path, columns=["row"], partitioning=None)["row"].to_numpy()] = True
    return answered


class ShardWriter:
    """Writes one process's shards, readable by their owner alone."""

    def __init__(self, table: Path, rank: int) -> None:
        self._folder = shard_folder(table)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prefix = f"rank{rank:05d}"
        self._rows: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()
        earlier = [int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"{self._prefix}-*.parquet")]
        self._next = max(earlier, default=-1) + 1

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; write a shard if the last one is some seconds old."""
        self._rows += rows
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in no shard yet; a UserError if the disk is full or the folder is not writable."""
        if self._rows:
            shard = pa.Table.from_pylist(self._rows, schema=_SCHEMA)
            with atomic_write(self._folder / f"{self._prefix}-{self._next:06d}.parquet") as partial:
                pq.write_table(shard, partial, write_page_checksum=True)
            self._next += 1
            self._rows = []
        self._flushed_at = time.monotonic()


def write_table(shards: Sequence[Path], notes: int, path: Path, separator: str | None = None) -> None:
    """Join shards to one table in the order of the source; it appears whole. `separator` is as in FORMATS."""
    columns = COLUMNS if separator is None else SET_COLUMNS
    parts = (part.select(columns) for part in parts_in_order(shards, notes))
    with atomic_write(path) as partial:
        FORMATS[path.suffix](partial, columns, parts, separator)


def parts_in_order(shards: Sequence[Path], notes: int, rows_per_pass: int = ROWS_PER_PASS) -> Iterator[pa.Table]:
    """Yield the rows of shards by their position in the source; of several for one note, the last shard's.

    Batches are sorted by length, so every shard has rows from all over the source. Each pass over the shards reads the
    rows of one range, so memory is bounded whatever the number of notes.
    """
    if not shards:
        return
    row = ds.field("row")
    dataset = ds.dataset(list(map(str, shards)), schema=_SCHEMA, format="parquet")
    for start in range(0, notes, rows_per_pass):
        rows = dataset.to_table(filter=(row >= start) & (row < start + rows_per_pass))
        position = rows["row"].to_numpy()
        order = np.argsort(position, kind="stable")
        rows = rows.take(order[np.diff(position[order], append=notes) > 0])  # the last of each note
        yield from (rows.slice(i, _BATCH) for i in range(0, len(rows), _BATCH))


@dataclass(frozen=True)
class ResumeKey:
    """Identifies what a run of `medlit predict` answers, without any note's text."""

    notes: int  # number of notes
    notes_hash: str  # changes with any note's id, text or tokens, and with their order
    weights_hash: str  # changes with the weights and with their temperature
    settings: dict[str, Any]  # flag -> value of the settings that an answer depends on, in JSON's types

    @classmethod
    def of(
        cls, module: SpecialtyClassifier, data: TranscriptionDataModule, checkpoint: str | None, precision: object
    ) -> Self:
        """The key of a run with these weights, settings and notes."""
        groups = {
            "language_model": asdict(module.language_model),
            "lora": {} if module.lora is None else module.lora.structure(),
            "decoding": asdict(module.decoding),
        }
        settings: dict[str, Any] = {
            f"model.{group}.{name}": value
            for group, values in groups.items()
            for name, value in values.items()
            if name not in _MEMORY_ONLY
        }
        settings |= {
            "data.instruction": data.instruction,
            "data.max_response_tokens": data.max_response_tokens,
            "trainer.precision": str(precision),
            "labels": None if data.label_set is None else list(data.label_set.names),
        }
        notes = data.predict_rows
        weights = _hash_weights(checkpoint, module.adapter, module.decoding)
        return cls(len(notes), _hash_notes(notes), weights, json.loads(json.dumps(settings)))

    def difference(self, earlier: Self) -> str | None:
        """What has changed since an earlier run; None when nothing has.

        Settings that only one of the two knows do not count: the earlier run may be of another version of medlit.
        """
        changes = []
        if (self.notes, self.notes_hash) != (earlier.notes, earlier.notes_hash):
            changes.append("the notes have changed")
        if self.weights_hash != earlier.weights_hash:
            changes.append("the weights or their temperature have changed")
        for name in sorted(self.settings.keys() & earlier.settings.keys()):
            before, now = earlier.settings[name], self.settings[name]
            if before != now:
                changes.append(f"{name} was {json.dumps(before)} and is {json.dumps(now)}")
        return ", ".join(changes) or None


def _hash_notes(rows: Dataset) -> str:
    """Hash tokenised notes, read in batches."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in rows.select_columns(["id", "text_hash", "length", "cut_tokens"]).iter(batch_size=_BATCH):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def _hash_weights(checkpoint: str | None, adapter: str | None, decoding: Decoding) -> str:
    """Hash the trained weights and what was fitted to this way of decoding."""
    folder = None if adapter is None else adapter_folder(adapter)
    files = [] if checkpoint is None else [Path(checkpoint)]
    files += [] if folder is None else sorted(folder.glob("adapter_model*"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    temperature, thresholds, prior = read_fitted(checkpoint, folder, decoding)
    digest.update(json.dumps([temperature, thresholds.get(decoding.sets), prior and prior.power]).encode())
    return digest.hexdigest()
