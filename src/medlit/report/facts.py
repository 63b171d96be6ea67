"""Facts that a report shows beside the scores: which notes, which split, which versions."""

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

_PACKAGES = ("torch", "unsloth", "transformers", "peft", "bitsandbytes", "lightning", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of the packages that the scores depend on, and the device."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"medlit": __version__, "Python": platform.python_version(), **packages, "device": device}


def data_facts(data: TranscriptionDataModule) -> dict[str, Any]:
    """Where the test notes come from and what they share with the training notes: counts and hashes, no text.

    Keys: source; revision (commit of a Hub dataset); split (the resolved kind); seed; fold; near_threshold; rows, texts
    (distinct) and hash of each split; classes (specialty -> notes in train, validation, test); test_texts_in_train and
    test_texts_in_validation (rows); test_conflicts (test rows whose text has several labels); test_ceiling (highest
    accuracy of a system that answers equal texts alike); left_out (reason -> rows of the source in no split).
    """
    splits, settings = data.splits, data.split
    if splits is None:
        return {}
    texts = {split: rows["text_hash"][:] for split, rows in splits.notes.items()}
    labels = {split: rows["specialty"][:] for split, rows in splits.notes.items()}
    label_counts = {split: Counter(names) for split, names in labels.items()}
    test = texts.get("test", [])
    labels_of_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text, label in zip(test, labels.get("test", []), strict=True):
        labels_of_text[text][label] += 1
    counts = labels_of_text.values()
    return {
        "source": data.source,
        "revision": None if data.fingerprint is None else data.fingerprint.revision,
        "split": splits.kind,
        "seed": settings.seed,
        "fold": f"{settings.fold} of {settings.folds}" if settings.kind == "kfold" else None,
        "near_threshold": settings.near_threshold,
        "rows": {split: len(rows) for split, rows in splits.notes.items()},
        "texts": {split: len(set(hashes)) for split, hashes in texts.items()},
        "hash": splits.hashes,
        "classes": {
            name: [label_counts.get(split, Counter())[name] for split in SPLITS]
            for name in sorted(set().union(*label_counts.values()))
        },
        "test_texts_in_train": _shared(test, texts.get("train", [])),
        "test_texts_in_validation": _shared(test, texts.get("validation", [])),
        "test_conflicts": sum(count.total() for count in counts if len(count) > 1),
        "test_ceiling": sum(max(count.values()) for count in counts) / max(len(test), 1),
        "left_out": dict(Counter(name for name in splits.assignment.split if name not in SPLITS)),
    }


def _shared(rows: list[str], others: list[str]) -> int:
    known = set(others)
    return sum(text in known for text in rows)
