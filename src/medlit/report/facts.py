"""What a reader must know beside the numbers: which notes, which split, which versions, which weights."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from medlit._version import __version__
from medlit.data.sources import SPLITS

if TYPE_CHECKING:
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.splits import NoteSplits

_PACKAGES = ("torch", "unsloth", "transformers", "peft", "bitsandbytes", "lightning", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the device."""
    found = {"medlit": __version__, "Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return found


def data_facts(data: TranscriptionDataModule) -> dict[str, Any]:
    """Where the test notes come from, and what they share with the training notes; counts and hashes, no text.

    Keys: source, revision (a Hub dataset's commit), split (the kind that was made), seed, fold, near_threshold; rows,
    texts (different ones), hash of each split; classes
    (specialty -> notes in train, validation, test); test_texts_in_train, test_texts_in_validation (rows);
    test_conflicts (rows whose text carries several labels in test); test_ceiling (share that the best answer to each
    text could get right); left_out (why -> rows of the source that are in no split).
    """
    partition = data.splits
    if partition is None:
        return {}
    settings = data.split
    return {
        "source": data.source,
        "revision": None if data.fingerprint is None else data.fingerprint.revision,
        "split": partition.kind,
        "seed": settings.seed,
        "fold": f"{settings.fold} of {settings.folds}" if settings.kind == "kfold" else None,
        "near_threshold": settings.near_threshold,
        **_counts(partition),
    }


def _counts(partition: NoteSplits) -> dict[str, Any]:
    notes = partition.notes
    texts = {split: rows["text_hash"][:] for split, rows in notes.items()}
    labels = {split: rows["specialty"][:] for split, rows in notes.items()}
    test = texts.get("test", [])
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text, label in zip(test, labels.get("test", []), strict=True):
        votes[text][label] += 1
    names = sorted({name for split in labels.values() for name in split})
    counts = {split: Counter(found) for split, found in labels.items()}
    outside = Counter(name for name in partition.assignment.split if name not in SPLITS)
    return {
        "rows": {split: len(rows) for split, rows in notes.items()},
        "texts": {split: len(set(found)) for split, found in texts.items()},
        "hash": partition.hashes,
        "classes": {name: [counts.get(split, Counter())[name] for split in SPLITS] for name in names},
        "test_texts_in_train": _shared(test, texts.get("train", [])),
        "test_texts_in_validation": _shared(test, texts.get("validation", [])),
        "test_conflicts": sum(vote.total() for vote in votes.values() if len(vote) > 1),
        "test_ceiling": sum(max(vote.values()) for vote in votes.values()) / max(len(test), 1),
        "left_out": dict(outside),
    }


def _shared(rows: list[str], others: list[str]) -> int:
    known = set(others)
    return sum(text in known for text in rows)
