"""`medlit baseline`: simpler systems on the same notes, and whether the fine-tuned model is significantly better.

Here are the command and the baselines without a language model: the majority class, and TF-IDF with logistic
regression. `head.py` trains the same base model with a classification head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.errors import UserError, best_effort
from medlit.evaluation.intervals import compare
from medlit.evaluation.metrics import HEADLINE, telling
from medlit.evaluation.results import FloatArray, IntArray, Results
from medlit.report.page import FILES, comparisons, system_rows, write_report
from medlit.report.systems import MODEL, System, comparable, read_system, write_system
from medlit.run_folder import check_replaceable, claim, next_version, run_name
from medlit.tools import make_parser, recorded_settings

if TYPE_CHECKING:
    from datasets import Dataset

    from medlit.data.datamodule import TranscriptionDataModule

_MANY_LABELS = 200
_MOST_WEIGHTS = 4_000_000  # of logistic regression with many labels


def run(args: Sequence[str]) -> int:
    """Fit the baselines, score them, compare; a UserError if settings, source or run folder cannot be used."""
    parser = make_parser("baseline")
    add = parser.add_argument
    text = "run folder of a test; without it the baselines are scored alone, in a new run folder"
    add("--run_dir", type=Path, metavar="DIR", help=text)
    text = "also train a classification head, which takes as long as a fit on a GPU"
    add("--head", action="store_true", help=text)
    text = "run folder of another test to add; may be given several times"
    add("--beside", type=Path, metavar="DIR", action="append", default=[], help=text)
    options, rest = parser.parse_known_args(args)
    # After --help: these imports take seconds.
    from medlit.cli.arguments import make_datamodule, parse_settings
    from medlit.cli.environment import check_writable

    run_dir: Path | None = options.run_dir
    if run_dir is not None and not run_dir.is_dir():
        raise UserError(f"run_dir: there is no folder {run_dir}; give the run folder of a test.")
    config = parse_settings("baseline", [*([] if run_dir is None else _recorded_settings(run_dir)), *rest])
    name = run_name([str(path) for path in config.config or []])
    folder = run_dir or next_version(Path(config.trainer.default_root_dir), name)
    check_writable("run_dir" if run_dir else "trainer.default_root_dir", folder / "report.html")
    if not config.overwrite:
        check_replaceable(folder, "baseline")

    model = read_system(folder, MODEL) if (folder / f"{MODEL}_metrics.json").is_file() else None
    others = [_other_run(other) for other in options.beside]
    if model is not None:
        for other in others:
            compare(model.results, other.results)  # refuses other notes before anything is fitted
    data = make_datamodule(config)
    notes = BaselineData.read(data, None if model is None else model.results)
    head = []
    if options.head:  # first, since it refuses settings that do not train one
        from medlit.tools.baseline.head import classification_head

        head = [classification_head(notes, data, config)]
    fitted = [majority(notes), tfidf(notes), *head]
    folder, _ = claim(folder, numbered=run_dir is None)
    for system in [*fitted, *others]:
        write_system(folder, system)
    with best_effort("the report"):
        write_report(folder)
    _show(comparable(folder)[0], [folder / name for name in FILES])
    return 0


def _recorded_settings(run_dir: Path) -> list[str]:
    """The settings of a run's test, and how long its fit trained, as an argument that flags can override."""
    test, fit = run_dir / "config_test.yaml", run_dir / "config_fit.yaml"
    kept = ("accelerator", "max_steps", "max_epochs", "gradient_clip_val")
    trainer = recorded_settings(fit if fit.is_file() else test, *kept)["trainer"]
    return ["--config", json.dumps(recorded_settings(test) | {"trainer": trainer})]


def _other_run(run_dir: Path) -> System:
    """Another run's test as a system; the bare base model is called zero-shot."""
    system, folder = read_system(run_dir, MODEL), run_dir.absolute()
    return replace(system, name="zero_shot" if system.zero_shot else f"{folder.parent.name}-{folder.name}")


def _show(systems: Sequence[System], files: Sequence[Path]) -> None:
    """Print the report's table and comparisons."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = systems[0].results
    table = Table(title=f"{len(first)} test notes, {len(first.names)} specialties", title_justify="left")
    table.add_column("system", overflow="fold")
    shown = telling(HEADLINE, systems[0].metrics)
    for metric in shown:
        table.add_column(metric.title, justify="right", no_wrap=True)
    for name, *cells in system_rows(systems, shown):
        table.add_row(escape(name), *cells)
    console = Console()
    console.print(table)
    for sentence in comparisons(systems):
        console.print(f"- {escape(sentence)}", highlight=False)
    console.print(f"medlit: written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class BaselineData:
    """The notes that baselines are fitted and scored on, not tokenised: canonical tables, and the K labels."""

    label_set: LabelSet  # spelled as the model's, if there is one
    train: Dataset
    test: Dataset  # the notes that the model was tested on, if there is a model
    tokens: IntArray  # in each test note's prompt, (N,); 0 without a model
    cut_tokens: IntArray  # from each test note, (N,)

    @classmethod
    def read(cls, data: TranscriptionDataModule, tested: Results | None) -> BaselineData:
        """Read and split the source as `medlit fit` does; the test notes are those of the model's results, if any."""
        notes = data.read_splits().notes
        if "test" not in notes:
            raise UserError(
                f"data.source: {data.source} has no test split; add one, or set data.split.kind to 'grouped'."
            )
        assert data.label_set is not None
        label_set, test = data.label_set if tested is None else LabelSet(tested.names), notes["test"]
        if tested is None:
            zeros = np.zeros(len(test), dtype=np.int64)
            return cls(label_set, notes["train"], test, zeros, zeros)
        position = {note: i for i, note in enumerate(test["id"][:])}
        unknown = [name for name in data.label_set if label_set.index(name) is None]
        if unknown or not all(note in position for note in tested.ids):
            raise UserError(
                "run_dir: the model was not tested on this test split; leave the data settings to those of the run,"
                " or test it again."
            )
        test = test.select([position[note] for note in tested.ids])
        if test["text_hash"][:] != tested.text_hashes:
            raise UserError("run_dir: the notes have other texts than when the model was tested; test it again.")
        return cls(label_set, notes["train"], test, tested.tokens, tested.cut_tokens)

    def label_ids(self, notes: Dataset) -> IntArray:
        """Label ids of notes, (N,); of several the first."""
        return np.array([self.label_set.index(name) for name in notes["specialty"][:]], dtype=np.int64)

    def answers(self) -> tuple[IntArray, IntArray]:
        """Note and label id of each training answer, (A,): a note with several labels stands once for each."""
        known = {name: self.label_set.index(name) for name in set(chain.from_iterable(specialties_of(self.train)))}
        pairs = [(note, known[name]) for note, own in enumerate(specialties_of(self.train)) for name in own]
        notes, labels = np.array(pairs, dtype=np.int64).T
        return notes, labels

    def system(self, name: str, probabilities: FloatArray) -> System:
        """Score a baseline by the K probabilities that it gives to each test note, (N, K)."""
        known: dict[str, int] = {name: label for label, name in enumerate(self.label_set)}
        known |= {name: self.label_set.index(name) for own in specialties_of(self.test) for name in own}  # type: ignore[misc]
        results = Results(
            names=self.label_set.names,
            rows=np.arange(len(self.test)),
            ids=self.test["id"][:],
            text_hashes=self.test["text_hash"][:],
            truth=self.label_ids(self.test),
            answer=probabilities.argmax(axis=1),
            probabilities=probabilities,
            tokens=self.tokens,
            cut_tokens=self.cut_tokens,
            accepted=[[known[name] for name in own] for own in specialties_of(self.test)],
        )
        return System.score(name, results)


def majority(data: BaselineData) -> System:
    """Answer every note with the most frequent specialty in training; probabilities are the shares in training."""
    counts = np.bincount(data.answers()[1], minlength=len(data.label_set))
    return data.system("majority", np.tile(counts / counts.sum(), (len(data.test), 1)))


def tfidf(data: BaselineData) -> System:
    """TF-IDF of words and word pairs with logistic regression, a strong baseline for long texts with key words."""
    features, iterations = None, 1000
    if len(data.label_set) > _MANY_LABELS:  # memory and the time of an iteration grow with labels x features
        features, iterations = _MOST_WEIGHTS // len(data.label_set), 50
        print(
            f"medlit: with {len(data.label_set):,} labels TF-IDF uses the {features:,} most frequent words and pairs,"
            f" and logistic regression stops after {iterations} iterations, since all of them would take hours",
            file=sys.stderr,
        )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=features),
        LogisticRegression(C=10, class_weight="balanced", max_iter=iterations),
    )
    notes, labels = data.answers()
    texts = data.train["transcription"][:]
    model.fit([texts[note] for note in notes], labels)
    probabilities = np.zeros((len(data.test), len(data.label_set)))  # a label without training notes has 0
    probabilities[:, model.classes_] = model.predict_proba(data.test["transcription"][:])
    return data.system("tfidf", probabilities)
