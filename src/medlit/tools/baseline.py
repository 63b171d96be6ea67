"""`medlit baseline`: simpler systems on the same notes, and whether the fine-tuned model is significantly better.

The majority class, and TF-IDF with logistic regression, whose regularisation is chosen by cross-validation within the
training split and whose temperature is fitted on the validation split, as the model's is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset
from scipy.linalg import cholesky, solve_triangular
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from medlit.cli import tool_parser
from medlit.cli.arguments import make_datamodule, parse_settings
from medlit.cli.environment import check_writable
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.errors import UserError, best_effort, report_if_slow, tell
from medlit.evaluation.calibration import at_temperature, fit_temperature
from medlit.evaluation.intervals import compare_systems
from medlit.evaluation.metrics import HEADLINE, applicable
from medlit.evaluation.results import FloatArray, IntArray, Results
from medlit.model.prior import MOST_WEIGHTS, examples_of
from medlit.report.page import FILES, comparisons, system_rows, write_report
from medlit.report.systems import MODEL, System, comparable, read_system, write_system
from medlit.run_folder import check_replaceable, check_run, claim, next_version, run_name
from medlit.tools import print_table, recorded_settings

_MANY_LABELS = 200
_SPAN_NOTES = 5_000  # a table of their similarities is 200 MB
_STRENGTHS = (1, 10, 100)  # C of logistic regression
_INNER_FOLDS, _MOST_ANSWERS = 3, 20_000  # to choose C by; with more training answers it is the middle one


def run(args: Sequence[str]) -> int:
    """Fit the baselines, score them, compare; a UserError if settings, source or run folder cannot be used."""
    options, rest = tool_parser("baseline").parse_known_args(args)
    run_dir: Path | None = options.run_dir
    for name, given in [("run_dir", run_dir), *(("beside", other) for other in options.beside)]:
        check_run(given, "a test", name)
    recorded = [] if run_dir is None else recorded_settings(run_dir / "config_test.yaml")
    config = parse_settings("baseline", [*recorded, *rest])
    name = run_name([str(path) for path in config.config or []])
    folder = run_dir or next_version(Path(config.trainer.default_root_dir), name)
    check_writable("run_dir" if run_dir else "trainer.default_root_dir", folder / "report.html")
    if not config.overwrite:
        check_replaceable(folder, "baseline")

    model = read_system(folder, MODEL) if (folder / f"{MODEL}_metrics.json").is_file() else None
    others = []
    for beside in map(Path.absolute, options.beside):
        other = read_system(beside, MODEL)  # the bare base model is called zero-shot
        if model is not None:
            compare_systems(model.results, other.results)  # refuses other notes before anything is fitted
        others.append(replace(other, name="zero_shot" if other.zero_shot else f"{beside.parent.name}-{beside.name}"))
    notes = BaselineData.read(make_datamodule(config), None if model is None else model.results)
    with report_if_slow("fitting the baselines"):
        fitted = [majority(notes), tfidf(notes)]
    folder, _ = claim(folder, numbered=run_dir is None)
    for system in [*fitted, *others]:
        write_system(folder, system)
    with best_effort("the report"):
        write_report(folder)
    systems = comparable(folder)[0]
    title = f"{len(systems[0].results)} test notes, {len(systems[0].results.names)} specialties"
    metrics = applicable(HEADLINE, systems[0].metrics)
    titles = [metric.title for metric in metrics]
    print_table(title, ["system", *titles], system_rows(systems, metrics), titles)
    print("".join(f"- {sentence}\n" for sentence in comparisons(systems)), end="")
    print(f"medlit: written: {', '.join(str(folder / name) for name in FILES)}")
    return 0


@dataclass(frozen=True)
class BaselineData:
    """The notes that baselines are fitted and scored on, not tokenised: canonical tables, and the K labels."""

    label_set: LabelSet  # spelled as the model's, if there is one
    train: Dataset
    test: Dataset  # the notes that the model was tested on, if there is a model
    tested: Results | None = None  # the model's
    validation: Dataset | None = None  # to fit temperatures on

    @classmethod
    def read(cls, data: TranscriptionDataModule, tested: Results | None) -> Self:
        """Read and split the source as `medlit fit` does; the test notes are those of the model's results, if any."""
        notes = data.read_splits().require("test", data.source).notes
        assert data.label_set is not None
        label_set, test = data.label_set, notes["test"]
        if tested is not None:
            label_set, position = LabelSet(tested.names), {note: i for i, note in enumerate(test["id"][:])}
            unknown = [name for name in data.label_set if label_set.index(name) is None]
            if unknown or not all(note in position for note in tested.ids):
                raise UserError(
                    "run_dir: the model was not tested on this test split; keep its data settings, or test it again."
                )
            test = test.select([position[note] for note in tested.ids])
            if test["text_hash"][:] != tested.text_hashes:
                raise UserError("run_dir: the notes have other texts than when the model was tested; test it again.")
        return cls(label_set, notes["train"], test, tested, notes.get("validation"))

    def label_ids(self, notes: Dataset) -> IntArray:
        """Label ids of notes, (N,); of several the first."""
        return np.array([self.label_set.index(name) for name in notes["specialty"][:]], dtype=np.int64)

    def system(self, name: str, probabilities: FloatArray, temperature: float | None = None) -> System:
        """Score a baseline by the K probabilities that it gives to each test note, (N, K)."""
        label_id: Any = self.label_set.index  # no label is unknown
        unknown = np.zeros(len(self.test), dtype=np.int64)  # without a model nothing is tokenised
        results = Results(
            names=self.label_set.names,
            rows=np.arange(len(self.test)),
            ids=self.test["id"][:],
            text_hashes=self.test["text_hash"][:],
            truth=self.label_ids(self.test),
            answer=probabilities.argmax(axis=1),
            probabilities=probabilities,
            tokens=self.tested.tokens if self.tested else unknown,
            cut_tokens=self.tested.cut_tokens if self.tested else unknown,
            accepted=[[label_id(name) for name in own] for own in specialties_of(self.test)],
        )
        return System.score(name, results, temperature=temperature)


def majority(data: BaselineData) -> System:
    """Answer every note with the most frequent specialty in training; probabilities are the shares in training."""
    counts = np.bincount(examples_of(data.train, data.label_set)[1], minlength=len(data.label_set))
    return data.system("majority", np.tile(counts / counts.sum(), (len(data.test), 1)))


def tfidf(data: BaselineData) -> System:
    """TF-IDF of words and word pairs with logistic regression, at the temperature that fits the validation split."""
    splits = [split for split in (data.test, data.validation) if split is not None]
    test, *validation = tfidf_probabilities(data, *(split["transcription"][:] for split in splits))
    if data.validation is None:
        return data.system("tfidf", test)
    temperature = fit_temperature(validation[0], data.label_ids(data.validation))
    return data.system("tfidf", at_temperature(test, temperature), temperature)


def tfidf_probabilities(data: BaselineData, *texts: Sequence[str]) -> list[FloatArray]:
    """TF-IDF with logistic regression, a strong baseline for long texts with key words; before calibration, (N, K)."""
    features, iterations, many = None, 1000, len(data.label_set) > _MANY_LABELS
    if many:  # memory and the time of an iteration grow with labels x features
        features, iterations = MOST_WEIGHTS // len(data.label_set), 50
        tell(
            f"with {len(data.label_set):,} labels TF-IDF uses the {features:,} most frequent words and pairs, and"
            f" logistic regression stops after {iterations} iterations, since all of them would take hours"
        )
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=features)
    x = vectorizer.fit_transform(data.train["transcription"][:])
    given = [vectorizer.transform(each) for each in texts]
    if x.shape[0] <= min(_SPAN_NOTES, x.shape[1]):
        # In an orthonormal basis of the notes' span the solution is the same, in a second instead of minutes.
        factor = cholesky((x @ x.T).toarray() + 1e-9 * np.eye(x.shape[0]), lower=True)
        given = [solve_triangular(factor, (x @ each.T).toarray(), lower=True).T for each in given]
        x = factor
    notes, labels = examples_of(data.train, data.label_set)
    x = x[notes]
    model: Any = LogisticRegression(C=_STRENGTHS[1], class_weight="balanced", max_iter=iterations)
    groups = np.asarray(data.train["text_hash"][:], dtype=np.str_)[notes]  # all answers to a text are in one fold
    if not many and len(notes) <= _MOST_ANSWERS and len(set(groups)) >= _INNER_FOLDS * len(data.label_set):
        folds = list(GroupKFold(_INNER_FOLDS).split(x, groups=groups))
        if all(len(np.unique(labels[inner])) > 1 for inner, _ in folds):  # else a fold's regression cannot be fitted
            model = GridSearchCV(model, {"C": _STRENGTHS}, cv=folds)
    model.fit(x, labels)
    probabilities = [np.zeros((each.shape[0], len(data.label_set))) for each in given]  # 0: a label without any note
    for of_texts, each in zip(probabilities, given, strict=True):
        of_texts[:, model.classes_] = model.predict_proba(each)
    return probabilities
