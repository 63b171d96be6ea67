"""`medlit baseline`: the model's own test notes, scored by simpler systems, compared and reported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from fakes import BRAIN, HEART, SPECIALTIES, notes, write_csv
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.evaluation.calibration import at_temperature, fit_temperature
from medlit.evaluation.results import Results
from medlit.report.systems import BASE_WEIGHTS, FACTS
from medlit.tools.baseline import BaselineData, tfidf
from medlit.tools.baseline import run as baseline

ZERO_SHOT = Path(__file__).parents[2] / "configs" / "debug" / "zero_shot.yaml"

if TYPE_CHECKING:
    from conftest import Medlit


def metrics(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / f"{name}_metrics.json").read_text())


@pytest.fixture(scope="module")
def tested(fitted: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny fit with its test."""
    from medlit.cli.cli import main

    folder = tmp_path_factory.mktemp("tested") / "tiny" / "version_0"
    shutil.copytree(fitted, folder)
    best = str(folder / "checkpoints" / "best.ckpt")
    main(["test", "--config", str(tiny_config), "--ckpt_path", best, "--run_dir", str(folder)])
    return folder


def test_without_a_model_the_baselines_are_a_run_of_their_own(
    notes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The base model does not exist: no weights and no tokenizer are needed.
    assert baseline(["--data.source", str(notes_folder), "--model.language_model.base_model", "./nowhere"]) == 0
    folder = tmp_path / "logs" / "medlit" / "version_0"
    written = {"metrics.json", "answers.parquet"}
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "report.md",
        *(f"baseline_{name}_{file}" for name in ("majority", "tfidf") for file in written),
    }
    assert "TF-IDF" in capsys.readouterr().out

    given = notes()
    train, test = ([row["transcription"] for row in given[split]] for split in ("train", "test"))
    labels = [row["medical_specialty"] for row in given["train"]]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    x, groups = vectorizer.fit_transform(train), np.unique(train, return_inverse=True)[1]
    models = [LogisticRegression(C=c, class_weight="balanced", max_iter=1000) for c in (1, 10, 100)]
    inner = [cross_val_score(each, x, labels, groups=groups, cv=GroupKFold(3)).mean() for each in models]
    model = models[int(np.argmax(inner))].fit(x, labels)
    found = pd.read_parquet(folder / "baseline_tfidf_answers.parquet")
    assert found["answer"].tolist() == model.predict(vectorizer.transform(test)).tolist()
    texts, truth = ([row[key] for row in given["validation"]] for key in ("transcription", "medical_specialty"))
    validation = model.predict_proba(vectorizer.transform(texts))
    temperature = fit_temperature(validation, np.array([list(model.classes_).index(name) for name in truth]))
    wanted = at_temperature(model.predict_proba(vectorizer.transform(test)), temperature)
    assert np.stack(found["probabilities"]) == pytest.approx(wanted, abs=1e-3)
    assert metrics(folder, "baseline_tfidf")["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert metrics(folder, "baseline_tfidf")["accuracy"] == pytest.approx((found["answer"] == found["truth"]).mean())

    commonest = max(SPECIALTIES, key=labels.count)
    answers = pd.read_parquet(folder / "baseline_majority_answers.parquet")
    assert set(answers["answer"]) == {commonest} == {HEART}
    assert answers["probabilities"][0].max() == pytest.approx(labels.count(HEART) / len(labels))


def test_a_run_s_baselines_answer_its_notes_and_are_compared_in_its_report(tested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    shutil.copytree(tested, folder)
    before = (folder / "test_metrics.json").read_bytes()
    assert baseline(["--run_dir", str(folder)]) == 0
    model, tfidf = (pd.read_parquet(folder / f"{name}_answers.parquet") for name in ("test", "baseline_tfidf"))
    for column in ("id", "text_hash", "truth", "tokens", "cut_tokens"):
        assert model[column].tolist() == tfidf[column].tolist(), column
    assert set(metrics(folder, "test")) == set(metrics(folder, "baseline_tfidf"))
    assert (folder / "test_metrics.json").read_bytes() == before
    report = (folder / "report.md").read_text()
    assert "Against TF-IDF + logistic regression:" in report
    assert "Against majority class:" in report
    assert not (tmp_path / "logs").exists()


def test_another_run_is_added_to_the_report(tested: Path, tmp_path: Path) -> None:
    folder, bare, other = tmp_path / "version_0", tmp_path / "version_1", tmp_path / "version_2"
    for copy in (folder, bare, other):
        shutil.copytree(tested, copy)
    facts = json.loads((bare / FACTS).read_text())
    facts["run"]["weights"] = BASE_WEIGHTS
    (bare / FACTS).write_text(json.dumps(facts))
    assert baseline(["--run_dir", str(folder), "--beside", str(bare), "--beside", str(other)]) == 0
    report = (folder / "report.md").read_text()
    assert "Against zero-shot: +0.0 points" in report
    assert f"Against {tmp_path.name}-version_2: +0.0 points" in report


def test_another_run_of_other_notes_is_refused_before_anything_is_fitted(tested: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "version_0", tmp_path / "version_1"
    for copy in (folder, other):
        shutil.copytree(tested, copy)
    record = Results.read(other / "test_answers.parquet")
    replace(record, ids=[*record.ids[1:], "another"]).write(other / "test_answers.parquet")
    with pytest.raises(UserError, match="not tested on the same notes"):
        baseline(["--run_dir", str(folder), "--beside", str(other)])
    with pytest.raises(UserError, match=r"^beside: there is no folder .*nowhere; give the run folder of a test"):
        baseline(["--run_dir", str(folder), "--beside", str(tmp_path / "nowhere")])
    assert not list(folder.glob("baseline_*"))


def test_another_run_without_metrics_is_refused(tested: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tested, tmp_path / "other")
    (other / "test_metrics.json").unlink()
    with pytest.raises(UserError, match=r"other/test_metrics\.json is missing or empty; run 'medlit test'"):
        baseline(["--run_dir", str(tested), "--beside", str(other)])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: shutil.rmtree(run), "there is no folder"),
        (lambda run: (run / "config_test.yaml").unlink(), "config_test.yaml is missing or damaged; run 'medlit test'"),
        (lambda run: (run / "config_test.yaml").write_text("[1"), r"config_test\.yaml is missing or damaged"),
        (lambda run: (run / "test_metrics.json").write_text("{"), r"test_metrics\.json is damaged"),
        (lambda run: (run / FACTS).write_text("{"), r"test_facts\.json is damaged"),
    ],
    ids=["no folder", "no test", "a damaged config", "damaged metrics", "damaged facts"],
)
def test_a_folder_without_a_whole_test_is_refused(tested: Path, tmp_path: Path, spoil: object, says: str) -> None:
    folder = tmp_path / "version_0"
    shutil.copytree(tested, folder)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=says):
        baseline(["--run_dir", str(folder)])
    assert not list(folder.glob("baseline_*"))


def test_other_notes_than_the_model_s_are_refused(tested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    shutil.copytree(tested, folder)
    for split, rows in notes().items():
        edited = [{**row, "transcription": row["transcription"] + " Edited."} for row in rows]
        write_csv(tmp_path / f"{split}.csv", edited)
    with pytest.raises(UserError, match="other texts than when the model was tested"):
        baseline(["--run_dir", str(folder), "--data.source", str(tmp_path)])
    with pytest.raises(UserError, match="not tested on this test split"):
        baseline(["--run_dir", str(folder), "--data.split.kind", "grouped", "--data.split.seed", "1"])


def test_labels_in_another_spelling_are_the_model_s(tested: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    shutil.copytree(tested, folder)
    for split, rows in notes().items():
        spelled = [row | {"medical_specialty": row["medical_specialty"].upper().replace("/", "\u2013")} for row in rows]
        write_csv(tmp_path / f"{split}.csv", spelled)
    assert baseline(["--run_dir", str(folder), "--data.source", str(tmp_path)]) == 0
    model, majority = (Results.read(folder / f"{name}_answers.parquet") for name in ("test", "baseline_majority"))
    assert majority.names == model.names
    assert majority.truth.tolist() == model.truth.tolist()


def test_an_unknown_setting_exits_2(run_medlit: Medlit) -> None:
    from medlit.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["baseline", "--data.sorce", "builtin"])
    assert stop.value.code == 2


def test_the_head_is_refused_with_its_new_place(notes_folder: Path) -> None:
    with pytest.raises(UserError, match=r"head: .* benchmarks/folds\.py"):
        baseline(["--data.source", str(notes_folder), "--head"])


@pytest.mark.filterwarnings("error")
def test_a_fold_of_one_label_leaves_the_strength_in_the_middle() -> None:
    """Two notes of one text alone have the second label, so that the folds that train without it have one label."""
    texts = [f"knee {row} pain" for row in range(8)] + ["heart murmur", "heart  murmur"]
    names = [["Bones"]] * 8 + [["Heart"]] * 2
    hashes = [f"t{row}" for row in range(8)] + ["t8", "t8"]
    rows = Dataset.from_dict(
        {
            "id": [f"n{row}" for row in range(10)],
            "transcription": texts,
            "specialty": [own[0] for own in names],
            "text_hash": hashes,
            "specialties": names,
        }
    )
    system = tfidf(BaselineData(LabelSet.from_names(["Bones", "Heart"]), rows, rows))
    x = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    middle = LogisticRegression(C=10, class_weight="balanced", max_iter=1000).fit(x, [own[0] for own in names])
    assert system.results.probabilities == pytest.approx(middle.predict_proba(x), abs=1e-3)


def test_many_labels_bound_the_time_of_tf_idf(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"ward {number}" for number in range(201)]
    texts = [f"seen today in{number}" for number in range(201)]
    columns = {"id": texts, "text_hash": texts, "transcription": texts, "specialty": names}
    rows = Dataset.from_dict(columns | {"specialties": [[name] for name in names]})
    system = tfidf(BaselineData(LabelSet.from_names(names), rows, rows))
    assert "with 201 labels TF-IDF uses the 19,900 most frequent words and pairs" in capsys.readouterr().err
    assert system.metrics["accuracy"] > 0.9


def test_notes_with_several_labels_from_the_fit_to_the_report(
    run_medlit: Medlit,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, rows in notes().items():
        cells = {HEART: f"{HEART};{BRAIN}"}
        several = [
            row | {"medical_specialty": cells.get(row["medical_specialty"], row["medical_specialty"])} for row in rows
        ]
        write_csv(tmp_path / f"{split}.csv", several)
    data = ["--data.source", tmp_path, "--data.labels.separator", ";", "--data.label_conflicts", "merge"]
    arguments = ["--config", tiny_config, *data]
    assert run_medlit("fit", *arguments, "--model.decoding.mode", "likelihood").code == 0
    assert run_medlit("test", *arguments, "--model.decoding.mode", "likelihood", "--ckpt_path", "best").code == 0
    folder = tmp_path / "logs" / "tiny" / "version_0"
    assert baseline(["--run_dir", str(folder)]) == 0

    for name in ("test", "baseline_tfidf", "baseline_majority"):
        found, results = metrics(folder, name), Results.read(folder / f"{name}_answers.parquet")
        heart, brain = (results.names.index(label) for label in (HEART, BRAIN))
        assert all(own == ([heart, brain] if own[0] == heart else own[:1]) for own in results.accepted)
        assert found["several_labels"] == sum(len(own) > 1 for own in results.accepted) > 0
        assert found["any_of_accuracy"] == pytest.approx(results.any_of.mean())
        assert found["accuracy"] == pytest.approx(results.correct.mean())
    report = (folder / "report.md").read_text()
    assert "| any-of accuracy |" in report
    assert f"| test notes with several labels | {metrics(folder, 'test')['several_labels']} of 8 |" in report
    assert "any-of accuracy" in capsys.readouterr().out
