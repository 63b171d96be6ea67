"""The systems of a run folder: the model that was tested, and what was tested beside it on the same notes.

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
from medlit.evaluation.results import Results

MODEL = "test"
# The order of the table, and the words in it.
KNOWN = {
    MODEL: "the model",
    "head": "classification head",
    "tfidf": "TF-IDF + logistic regression",
    "zero_shot": "zero-shot",
    "majority": "majority class",
}
_PREFIX = "baseline_"


@dataclass(frozen=True)
class System:
    """What answered the test notes.

    Attributes:
        name: `test` for the model, else the baseline's name.
        metrics: what its metrics file holds.
        answered: its record.
    """

    name: str
    metrics: Mapping[str, Any]
    answered: Results

    @property
    def title(self) -> str:
        """Its name for people."""
        return KNOWN.get(self.name, self.name)


def stem(name: str) -> str:
    """What the names of a system's two files begin with."""
    return MODEL if name == MODEL else _PREFIX + name


def write_system(folder: Path, system: System) -> None:
    """Write a system's metrics and record."""
    system.answered.write(folder / f"{stem(system.name)}_answers.parquet")
    write_json(folder / f"{stem(system.name)}_metrics.json", system.metrics)


def read_system(folder: Path, name: str) -> System:
    """Read one system.

    Raises:
        UserError: its files are missing or damaged.
    """
    path = folder / f"{stem(name)}_metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"run: {path} is missing or damaged; run 'medlit test' for that folder again.") from error
    return System(name, metrics, Results.read(folder / f"{stem(name)}_answers.parquet"))


def systems(folder: Path) -> list[System]:
    """All systems of a run folder, the model first.

    Raises:
        UserError: a file is damaged.
    """
    names = [path.name.removesuffix("_metrics.json") for path in folder.glob(f"{_PREFIX}*_metrics.json")]
    found = sorted(name.removeprefix(_PREFIX) for name in names)
    if (folder / f"{MODEL}_metrics.json").is_file():
        found.insert(0, MODEL)
    order = list(KNOWN)
    return [read_system(folder, name) for name in sorted(found, key=lambda n: order.index(n) if n in order else 2.5)]


def comparable(folder: Path) -> tuple[list[System], list[System]]:
    """The systems that answered the first one's notes, and those that answered others: a baseline of an earlier test.

    Raises:
        UserError: a file is damaged.
    """
    everyone = systems(folder)
    found = [system for system in everyone if same_notes(everyone[0].answered, system.answered)]
    kept = {system.name for system in found}
    return found, [system for system in everyone if system.name not in kept]
