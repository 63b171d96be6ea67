"""The systems of a run folder: the tested model, and the others that were tested on the same notes.

logs/<config>/version_N/
    test_metrics.json             test_answers.parquet              the model
    baseline_<name>_metrics.json  baseline_<name>_answers.parquet   each other system
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlit.atomic_io import write_json
from medlit.errors import UserError
from medlit.evaluation.compare import same_notes
from medlit.evaluation.metrics import uncertainty
from medlit.evaluation.results import Results

MODEL = "test"
# Titles in the order of the table; systems of other names come before zero-shot.
TITLES = {
    MODEL: "the model",
    "head": "classification head",
    "tfidf": "TF-IDF + logistic regression",
    "zero_shot": "zero-shot",
    "majority": "majority class",
}
_PREFIX = "baseline_"
_METRICS = "_metrics.json"


@dataclass(frozen=True)
class System:
    """One system's answers to the test notes.

    Attributes:
        name: `test` for the model, else the baseline's name.
        metrics: content of its metrics file; an older version may lack a key.
        results: its answers, note by note.
    """

    name: str
    metrics: Mapping[str, Any]
    results: Results

    @classmethod
    def score(cls, name: str, results: Results, loss: float | None = None) -> System:
        """Compute the metrics of results that are complete."""
        import torch

        from medlit.data.labels import LabelSet
        from medlit.model.metrics import SpecialtyMetrics

        counts = SpecialtyMetrics(LabelSet(results.names))
        counts.update(torch.from_numpy(results.answer), torch.from_numpy(results.truth))
        return cls(name, {**counts.scores(), **uncertainty(results), "loss": loss}, results)

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        return TITLES.get(self.name, self.name)


def write_system(folder: Path, system: System) -> None:
    """Write a system's metrics and results."""
    stem = _stem(system.name)
    system.results.write(folder / f"{stem}_answers.parquet")
    write_json(folder / f"{stem}{_METRICS}", system.metrics)


def read_system(folder: Path, name: str) -> System:
    """Read one system.

    Raises:
        UserError: its files are missing or damaged.
    """
    path = folder / f"{_stem(name)}{_METRICS}"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"run_dir: {path} is missing or damaged; run 'medlit test' in that folder again.") from error
    return System(name, metrics, Results.read(folder / f"{_stem(name)}_answers.parquet"))


def systems(folder: Path) -> list[System]:
    """All systems of a run folder, the model first.

    Raises:
        UserError: a file is damaged.
    """
    baselines = [path.name.removesuffix(_METRICS) for path in folder.glob(f"{_PREFIX}*{_METRICS}")]
    names = sorted(name.removeprefix(_PREFIX) for name in baselines)
    if (folder / f"{MODEL}{_METRICS}").is_file():
        names.insert(0, MODEL)
    order = list(TITLES)
    return [read_system(folder, name) for name in sorted(names, key=lambda n: order.index(n) if n in order else 2.5)]


def comparable(folder: Path) -> tuple[list[System], list[System]]:
    """Split a folder's systems into those that answered the first one's notes and those of an earlier test.

    Raises:
        UserError: a file is damaged.
    """
    found = systems(folder)
    same = [same_notes(found[0].results, system.results) for system in found]
    return (
        [system for system, kept in zip(found, same, strict=True) if kept],
        [system for system, kept in zip(found, same, strict=True) if not kept],
    )


def _stem(name: str) -> str:
    return MODEL if name == MODEL else _PREFIX + name
