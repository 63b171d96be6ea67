"""SpecialtyPredictor answers as `medlit predict` does, in the order of the notes, and refuses what it cannot answer."""

from __future__ import annotations

import doctest
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fakes import notes, write_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medlit as package
from medlit import Prediction, UserError
from medlit.model.adapter_metadata import AdapterMetadata, InferenceSettings
from medlit.model.language_model import Fp8Linear
from medlit.predictions.table import COLUMNS, SetPrediction

if TYPE_CHECKING:
    from conftest import Medlit

    from medlit import SpecialtyPredictor

MODES = ("generate", "constrained", "likelihood")
# Short ones, one that is cut, one with a template and a control token in it, one with quotes and line ends.
ROWS = [row for split in notes().values() for row in split][:20]
TEXTS = [row["transcription"] for row in ROWS]
Load = Callable[..., "SpecialtyPredictor"]


@pytest.fixture(scope="module")
def load(fitted: Path) -> Load:
    """Load the tiny fit's adapter, once for the same settings."""
    from medlit import SpecialtyPredictor

    made: dict[str, SpecialtyPredictor] = {}

    def of(**wanted: Any) -> SpecialtyPredictor:  # noqa: ANN401
        key = repr(sorted(wanted.items()))
        if key not in made:
            made[key] = SpecialtyPredictor.load(fitted, device="cpu", **({"batch_size": 4} | wanted))
        return made[key]

    return of


def plain(predictions: list[Prediction]) -> list[tuple[object, ...]]:
    """Predictions without the numbers that depend on a batch's rounding."""
    return [(one.specialty, one.answer, one.runner_up, one.abstained, one.cut_tokens) for one in predictions]


def numbers(predictions: list[Prediction]) -> list[float | None]:
    return [number for one in predictions for number in (one.probability, one.margin)]


# --- as the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_it_answers_as_the_command_does(
    run_medlit: Medlit, fitted: Path, tiny_config: Path, tmp_path: Path, load: Load, mode: str
) -> None:
    table = write_csv(
        tmp_path / "new.csv", [{k: v for k, v in row.items() if k != "medical_specialty"} for row in ROWS]
    )
    flags = [
        "--model.adapter",
        fitted / "adapter",
        "--data.predict.source",
        table,
        "--data.batching.token_budget",
        "8192",
    ]
    flags += ["--model.decoding.mode", mode, "--output", tmp_path / "out.jsonl"]
    assert run_medlit("predict", "--config", tiny_config, *flags).code == 0
    table_rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    predictions = load(mode=mode, max_new_tokens=8, token_budget=8192).predict(TEXTS)
    assert [asdict(one) for one in predictions] == [{k: v for k, v in row.items() if k != "id"} for row in table_rows]
    assert max(one.cut_tokens for one in predictions) > 0
    assert all((one.probability is None) == (mode == "generate") for one in predictions)


def test_it_uses_the_temperature_that_a_validation_fitted(
    run_medlit: Medlit, run: Path, tiny_config: Path, load: Load
) -> None:
    from medlit import SpecialtyPredictor

    flags = ["--config", tiny_config, "--model.adapter", run / "adapter", "--model.decoding.mode", "likelihood"]
    assert run_medlit("validate", *flags).code == 0
    temperature = next(iter(json.loads((run / "adapter" / "medlit.json").read_text())["temperatures"].values()))
    assert temperature != 1
    before, after = load().predict(TEXTS), SpecialtyPredictor.load(run, device="cpu", batch_size=4).predict(TEXTS)
    assert plain(before) == plain(after)
    assert numbers(before) != numbers(after)


def test_it_makes_the_sets_that_the_command_makes(
    run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    from medlit import SpecialtyPredictor

    sets = ["--model.decoding.mode", "likelihood", "--model.decoding.coverage", "0.6"]
    flags = ["--config", tiny_config, "--model.adapter", run / "adapter", *sets]
    with pytest.raises(UserError, match=r"model\.decoding\.coverage: .* no threshold for 0\.6 with 'likelihood'"):
        SpecialtyPredictor.load(run, device="cpu", coverage=0.6)
    refused = run_medlit("test", *flags)
    assert (refused.code, refused.err.count("run 'medlit validate' with these settings")) == (2, 1)
    assert run_medlit("validate", *flags).code == 0
    assert run_medlit("predict", *flags, "--output", tmp_path / "out.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = [note["transcription"] for note in notes()["test"]]
    found = SpecialtyPredictor.load(run, device="cpu", coverage=0.6).predict(texts)
    assert [one.set for one in found if isinstance(one, SetPrediction)] == [row["set"] for row in rows]
    assert [field.name for field in fields(SetPrediction)] == [name for name in rows[0] if name != "id"]
    assert all(row["set_size"] == len(row["set"]) == len(row["set_probabilities"]) for row in rows)


def test_a_prediction_has_the_columns_of_the_table_without_the_id() -> None:
    assert [field.name for field in fields(Prediction)] == [name for name in COLUMNS if name != "id"]


def test_an_uncertain_answer_is_withheld(load: Load) -> None:
    found = load(abstain_below=1.0).predict(TEXTS[3:6])
    assert all(one.abstained and one.specialty is None and one.answer for one in found)


# --- whatever the order and the batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_answers_as_one_by_one(load: Load, mode: str) -> None:
    predictor = load(mode=mode, max_new_tokens=8)
    together, alone = predictor.predict(TEXTS[:8]), [predictor.predict([text])[0] for text in TEXTS[:8]]
    assert plain(together) == plain(alone)
    assert numbers(together) == pytest.approx(numbers(alone), abs=1e-4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(8)), batch_size=st.sampled_from([1, 3, 32]))
def test_answers_come_in_the_order_of_the_notes(load: Load, order: list[int], batch_size: int) -> None:
    wanted = load(batch_size=32).predict(TEXTS[:8])
    assert len({one.probability for one in wanted}) > 4  # else any order would do; two of the texts are the same
    found = load(batch_size=batch_size).predict([TEXTS[place] for place in order])
    assert plain(found) == plain([wanted[place] for place in order])
    assert numbers(found) == pytest.approx(numbers([wanted[place] for place in order]), abs=1e-4)


def test_no_notes_give_no_predictions(load: Load) -> None:
    assert load().predict([]) == load().predict(()) == load().predict(pd.Series([], dtype=str)) == []


@pytest.mark.parametrize(
    "column",
    [
        tuple,
        pd.Series,
        lambda texts: pd.Series(texts, index=range(7, 9), dtype="category"),
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
        pa.array,
        lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
        lambda texts: pa.array(texts, pa.large_string()),
    ],
)
def test_a_column_of_any_library_is_a_list_of_texts(load: Load, column: Callable[[list[str]], Any]) -> None:
    assert plain(load().predict(column(TEXTS[3:5]))) == plain(load().predict(TEXTS[3:5]))


@pytest.mark.parametrize(
    "notes",
    [
        pd.DataFrame({"transcription": ["a note"]}),
        {"transcription": ["a note"]},
        {"a note"},
        b"a note",
        bytearray(b"a note"),
        io.StringIO("a note\n"),
        (text for text in ["a note"]),
        iter(["a note"]),
        np.array([["a note"]]),
        np.array("a note"),
        pa.table({"transcription": ["a note"]}),
        datasets.Dataset.from_dict({"transcription": ["a note"]}),
        Path("a note"),
        None,
        7,
    ],
    ids=lambda notes: type(notes).__name__,
)
def test_what_is_no_list_of_texts_is_refused(load: Load, notes: Any) -> None:  # noqa: ANN401
    with pytest.raises(UserError, match=r"notes: give a list of texts or a column, .* not \w+; .*\[text\]\.") as caught:
        load().predict(notes)
    assert "a note" not in str(caught.value)


def test_loading_prints_nothing_to_a_log(fitted: Path) -> None:
    code = "import sys, medlit; medlit.SpecialtyPredictor.load(sys.argv[1], device='cpu').predict(['A knee.'])"
    done = subprocess.run([sys.executable, "-c", code, fitted], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "Loading weights" not in done.stderr
    assert "%|" not in done.stderr


def test_a_progress_bar_on_request_counts_notes(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load().predict(TEXTS[:3])
    assert capsys.readouterr() == ("", "")
    load().predict(TEXTS[:3], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    assert "notes/s" in shown.err


# --- what it cannot answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("Patient 30 years old.", "give a list of texts"),
        (["a note", None], r"notes\[1\]: must be a text, not NoneType"),
        ([float("nan")], r"notes\[0\]: must be a text, not float"),
        (["a note", Path("a note")], r"notes\[1\]: must be a text, not PosixPath; give the note's text"),
        ([["a note"]], r"notes\[0\]: must be a text, not list"),
        (pd.Series(["a note", None], index=[3, 4], dtype=object), r"notes\[1\]: must be a text, not NoneType"),
        (pd.Series(["a note", pd.NA], dtype=object), r"notes\[1\]: must be a text, not NAType"),
        (pd.Series(["a note", None]), r"notes\[1\]: must be a text, not"),
        (np.arange(2), r"notes\[0\]: must be a text, not int64"),
        (pa.array(["a note", None]), r"notes\[1\]: must be a text, not NoneType"),
        (range(2), r"notes\[0\]: must be a text, not int"),
        (["a note", "a note", " \r\n\t"], r"notes\[2\]: the note is empty"),
    ],
)
def test_an_invalid_note_is_named_by_its_position(load: Load, texts: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(UserError, match=message) as caught:
        load().predict(texts)
    assert "a note" not in str(caught.value)
    assert "Patient" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"mode": "guess"}, "mode: must be one of generate, constrained, likelihood"),
        ({"mode": "generate", "abstain_below": 0.5}, "'generate' gives no probabilities"),
        ({"mode": "generate", "coverage": 0.9}, r"model\.decoding\.coverage: 'generate' gives no probabilities"),
        ({"mode": "generate", "answer": "set"}, r"model\.decoding\.answer: 'generate' gives no probabilities"),
        ({"coverage": 1.0}, r"model\.decoding\.coverage: must be over 0\.5 and under 1"),
        ({"answer": "many"}, "answer: must be one of one, set"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"max_length": 0}, "max_length: must be at least 1"),
        ({"max_length": 30}, "30 tokens leave no room for a note"),
        ({"device": "quantum"}, "device: quantum is neither 'cpu' nor"),
        ({"device": "cuda:99"}, "device: cuda:99 is neither 'cpu' nor"),
    ],
)
def test_a_wrong_setting_is_named_before_weights_are_read(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], message: str
) -> None:
    from medlit import SpecialtyPredictor

    monkeypatch.setattr("medlit.predictor.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        SpecialtyPredictor.load(fitted / "adapter", **wanted).predict(["a note"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "has no medlit.json"),
        (lambda file: edit(file, prompt="alpaca-0"), "trained with the prompt 'alpaca-0'"),
        (lambda file: edit(file, lora={"rank": 16}), "is damaged"),
        (lambda file: edit(file, inference={"max_length": "long"}), "was not written by this version of medlit"),
        (lambda file: edit(file, inference=[1]), "medlit.json was not written by this version of medlit"),
        (lambda file: (file.parent / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_refused(run: Path, spoil: Callable[[Path], object], message: str) -> None:
    from medlit import SpecialtyPredictor

    spoil(run / "adapter" / "medlit.json")
    with pytest.raises(UserError, match=message):
        SpecialtyPredictor.load(run / "adapter")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- what an adapter's metadata holds ---------------------------------------------------------------------------------


def test_an_adapter_holds_the_limits_that_it_was_trained_with(run: Path) -> None:
    metadata = AdapterMetadata.read(run / "adapter" / "medlit.json")
    assert metadata.inference == InferenceSettings(112, 8, True, "auto")


def test_a_note_is_cut_as_in_training_without_a_setting(
    run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    from medlit import SpecialtyPredictor

    long = max(TEXTS, key=len)
    table = write_csv(tmp_path / "new.csv", [{"id": "long", "transcription": long}])
    (prediction,) = SpecialtyPredictor.load(run, device="cpu").predict([long])
    flags = ["--model.adapter", run / "adapter", "--data.predict.source", table, "--output", tmp_path / "out.jsonl"]
    assert run_medlit("predict", "--config", tiny_config, *flags, "--model.decoding.mode", "likelihood").code == 0
    assert {"id": "long"} | asdict(prediction) == json.loads((tmp_path / "out.jsonl").read_text())
    assert prediction.cut_tokens > 0


def test_an_adapter_trained_on_fp8_weights_answers_on_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medlit import SpecialtyPredictor
    from medlit.model.loading import load_model

    def load(*arguments: Any) -> Any:  # noqa: ANN401
        loaded.append(load_model(*arguments))
        return loaded[-1]

    loaded: list[Any] = []
    monkeypatch.setattr("medlit.predictor.load_model", load)
    inference = json.loads((run / "adapter" / "medlit.json").read_text())["inference"]
    edit(run / "adapter" / "medlit.json", inference=inference | {"load_in_4bit": False, "load_in_fp8": True})
    answers = [SpecialtyPredictor.load(run, mode=mode, device="cpu").predict(TEXTS[:4]) for mode in MODES]
    assert all(answer.specialty for mode in answers[1:] for answer in mode)
    assert [sum(isinstance(part, Fp8Linear) for part in model.modules()) for model in loaded] == [2 * 7] * 3


def test_an_adapter_without_limits_is_refused(run: Path) -> None:
    from medlit import SpecialtyPredictor

    file = run / "adapter" / "medlit.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "inference"}))
    with pytest.raises(UserError, match=r"lacks max_length.* use `medlit predict` with its config"):
        SpecialtyPredictor.load(run)


# --- as a library -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_is_true(run: Path) -> None:
    from medlit import predictor

    run.parent.rename(run.parent.with_name("quickstart"))
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(predictor.SpecialtyPredictor, "SpecialtyPredictor", globs={})
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_importing_medlit_is_light_and_the_predictor_brings_unsloth_before_transformers() -> None:
    program = (
        "import sys, medlit\n"
        "heavy = {'torch', 'transformers', 'lightning', 'unsloth', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from medlit import Prediction, UserError\n"
        "assert not heavy & set(sys.modules)\n"
        "assert 'SpecialtyPredictor' in medlit.__all__ and not hasattr(medlit, 'Predictor')\n"
        "import medlit.unsloth_first as door\n"
        "door.import_unsloth = lambda: print('transformers' in sys.modules)\n"
        "medlit.SpecialtyPredictor\n"
        "import medlit.cli.cli\n"
        "assert 'unsloth' not in sys.modules, 'nor by a module of its own accord'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
