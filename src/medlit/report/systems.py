"""The systems of a run folder: the tested model, and the others, `baseline_*`, that were tested on the same notes."""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
import yaml

from medlit.atomic_io import read_json, write_json
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.groups import accuracy_ceiling
from medlit.data.labels import LabelSet
from medlit.data.sources import SPLITS
from medlit.errors import UserError
from medlit.evaluation.intervals import align
from medlit.evaluation.metrics import uncertainty
from medlit.evaluation.results import Results
from medlit.model.metrics import SpecialtyMetrics
from medlit.paths import __version__

MODEL = "test"
# Titles in the order of the table; systems of other names come before zero-shot.
TITLES = {
    MODEL: "fine-tuned",
    "tfidf": "TF-IDF + logistic regression",
    "zero_shot": "zero-shot",
    "majority": "majority class",
}
FACTS = "test_facts.json"
BASE_WEIGHTS = "the bare base model"  # value of `weights` among the facts of a test without trained weights
_PREFIX = "baseline_"
_METRICS = "_metrics.json"


@dataclass(frozen=True)
class System:
    """One system's answers to the test notes."""

    name: str  # `test` for the model, else the baseline's name
    metrics: Mapping[str, Any]  # content of its metrics file; an older version may lack a key
    results: Results  # its answers, note by note
    zero_shot: bool = False  # whether `test` was a test of the base model

    @classmethod
    def score(cls, name: str, results: Results, **known: float | None) -> Self:
        """Compute the metrics of results that are complete; its loss and temperature may be `known`."""
        counts = SpecialtyMetrics(LabelSet(results.names))
        most = max(map(len, results.accepted), default=1)
        accepted = torch.tensor([own + own[:1] * (most - len(own)) for own in results.accepted])
        counts.update(torch.from_numpy(results.answer), torch.from_numpy(results.truth), accepted)
        return cls(name, {**counts.scores(), **uncertainty(results), "loss": None, **known}, results)

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        return TITLES.get("zero_shot" if self.zero_shot else self.name, self.name)


def write_system(folder: Path, system: System) -> None:
    """Write a system's metrics and results."""
    stem = _stem(system.name)
    system.results.write(folder / f"{stem}_answers.parquet")
    write_json(folder / f"{stem}{_METRICS}", system.metrics)


def read_system(folder: Path, name: str) -> System:
    """Read one system; a UserError if its files are missing or damaged."""
    if not (metrics := read_run_file(path := folder / f"{_stem(name)}{_METRICS}")):
        raise UserError(f"run_dir: {path} is missing or empty; run 'medlit test' in that folder.")
    zero_shot = name == MODEL and read_run_file(folder / FACTS).get("run", {}).get("weights") == BASE_WEIGHTS
    return System(name, metrics, Results.read(folder / f"{_stem(name)}_answers.parquet"), zero_shot)


def read_run_file(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of a run folder; empty if there is none, a UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return {**yaml.safe_load(path.read_text(encoding="utf-8"))} if path.suffix == ".yaml" else read_json(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"run_dir: {path} is damaged; run 'medlit test' again, or move it away.") from error


def systems(folder: Path) -> list[System]:
    """All systems of a run folder, the fine-tuned model first; a UserError if a file is damaged."""
    stems = [path.name.removesuffix(_METRICS) for path in folder.glob(f"*{_METRICS}")]
    names = sorted(stem.removeprefix(_PREFIX) for stem in stems if stem == MODEL or stem.startswith(_PREFIX))
    order = {name: place for place, name in enumerate(TITLES)}
    return [read_system(folder, name) for name in sorted(names, key=lambda name: order.get(name, 2.5))]


def comparable(folder: Path) -> tuple[list[System], list[System]]:
    """Split a folder's `systems` into those that answered the first one's notes and those of an earlier test."""
    found = systems(folder)
    is_same = {system.name: align(found[0].results, system.results) is not None for system in found}
    return [each for each in found if is_same[each.name]], [each for each in found if not is_same[each.name]]


def _stem(name: str) -> str:
    return MODEL if name == MODEL else _PREFIX + name


_PACKAGES = ("torch", "unsloth", "transformers", "peft", "bitsandbytes", "lightning", "scikit-learn")


def package_versions() -> dict[str, str]:
    """Versions of the packages that the scores depend on, and the device."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"medlit": __version__, "Python": platform.python_version(), **packages, "device": device}


def data_facts(data: TranscriptionDataModule) -> dict[str, Any]:
    """Where the test notes come from and what they share with the training notes: counts and hashes, no text.

    Keys: source; revision (commit of a Hub dataset); split (the resolved kind); seed (null if nothing was drawn); fold;
    near_threshold (if it had an effect); rows, texts (distinct) and hash of each split; classes (specialty -> notes in
    train, validation, test); test_texts_in_train and _in_validation (rows), or mismatch (the warning that the weights
    were trained with other splits); test_conflicts (rows whose text has other labels in another row); test_several
    (notes with several labels, if any); test_ceiling (highest accuracy of a system that answers equal texts alike; any
    of a note's labels is right); left_out (reason -> rows in no split).
    """
    splits, settings = data.splits, data.split
    if splits is None:
        return {}
    none: dict[str, Any] = {"text_hash": [], "specialties": []}
    tables = {split: pd.DataFrame({name: splits.notes.get(split, none)[name][:] for name in none}) for split in SPLITS}
    notes = pd.concat(tables, names=["split"]).reset_index("split")
    each = notes.explode("specialties", ignore_index=True)  # pandas 3.0 cannot count with a repeated index
    classes = pd.crosstab(each["specialties"], each["split"]).reindex(columns=SPLITS, fill_value=0)
    known = () if data.mismatch else ("train", "validation")  # as the weights had them
    test = tables["test"]["text_hash"]
    own = tables["test"]["specialties"].map(frozenset)
    several = int((own.map(len) > 1).sum())
    return {
        "source": data.source,
        "revision": None if data.fingerprint is None else data.fingerprint.revision,
        "split": splits.kind,
        "seed": splits.seed,
        "fold": f"{settings.fold} of {settings.folds}" if settings.kind == "kfold" else None,
        "near_threshold": splits.near_threshold,
        "rows": {split: len(rows) for split, rows in splits.notes.items()},
        "texts": {split: tables[split]["text_hash"].nunique() for split in splits.notes},
        "hash": splits.hashes,
        "classes": dict(zip(classes.index, classes.to_numpy().tolist(), strict=True)),
        **({"mismatch": data.mismatch} if data.mismatch else {}),
        **{f"test_texts_in_{split}": int(test.isin(tables[split]["text_hash"]).sum()) for split in known},
        "test_conflicts": int((own.groupby(test).transform("nunique") > 1).sum()),
        **({"test_several": several} if several else {}),
        "test_ceiling": accuracy_ceiling(test, own.tolist()),
        "left_out": dict(Counter(name for name in splits.assignment.split if name not in SPLITS)),
    }
