"""The folds benchmark: its systems answer every note once, and are scored and compared as it says."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import BONE, HEART, notes, write_csv, write_notes

from medlit.evaluation.results import Results

NAMES = ("a", "b", "c")


def answers(folder: Path, system: str, probabilities: np.ndarray) -> None:
    """Write what a system answers in three folds: the texts t0 .. t5, two a fold, validated on the next fold's."""
    for fold in range(3):
        place = folder / system / f"fold_{fold}"
        place.mkdir(parents=True, exist_ok=True)
        for split, which in (("test", fold), ("validation", (fold + 1) % 3)):
            texts = [2 * which, 2 * which + 1]
            zeros = np.zeros(2, dtype=np.int64)
            ids = [f"t{text}" for text in texts]
            Results(NAMES, zeros, ids, ids, zeros, zeros, probabilities[texts], zeros, zeros, [[0], [0]]).write(
                place / f"{split}_answers.parquet"
            )


def units(by_rows: bool) -> Any:  # noqa: ANN401 - a module of the benchmarks
    """Six texts with the labels a, b, c, a, b, c; t0 stands under c too, in a second row."""
    from folds_scores import Units

    truth = np.array([0, 1, 2, 0, 1, 2])
    accepted = np.eye(3, dtype=np.bool_)[truth]
    accepted[0, 2] = True
    texts, groups = [f"t{i}" for i in range(6)], np.arange(6)
    if by_rows:
        truth, accepted = np.append(truth, 2), np.concatenate([accepted, accepted[:1]])
        texts, groups = [*texts, "t0"], np.append(groups, 0)
    return Units(NAMES, texts, truth, accepted, groups, by_rows)


def certain(*labels: int) -> np.ndarray:
    return np.eye(3)[list(labels)] * 0.7 + 0.1


def test_rows_of_a_text_are_scored_with_its_answer(tmp_path: Path) -> None:
    from folds_scores import score

    answers(tmp_path, "x", certain(0, 1, 2, 0, 1, 1))
    found = score("x", "x", tmp_path, units(by_rows=True), range(3))
    assert found is not None
    row = found.row()
    assert row["n"] == 7
    assert row["any_of"] == pytest.approx(6 / 7), "all rows but that of t5"
    assert row["strict"] == pytest.approx(5 / 7), "nor the second row of t0"


def test_a_difference_is_of_the_same_units_and_changes_its_sign(tmp_path: Path) -> None:
    from folds_scores import difference, score

    answers(tmp_path, "x", certain(0, 1, 2, 0, 1, 2))
    answers(tmp_path, "y", certain(0, 1, 2, 1, 2, 0))
    x, y = (score(name, name, tmp_path, units(by_rows=False), range(3)) for name in "xy")
    assert x is not None
    assert y is not None
    there, back = difference(x, y), difference(y, x)
    for metric in ("any_of", "strict", "f1_macro", "set_f1_micro"):
        value, low, high = there[metric]
        assert low <= value <= high
        assert back[metric] == pytest.approx([-value, -high, -low])
    assert there["any_of"][0] == pytest.approx(50)


def test_recipes_average_and_multiply_probabilities(tmp_path: Path) -> None:
    from folds_scores import score

    answers(tmp_path, "x", certain(0, 1, 2, 0, 1, 2))
    answers(tmp_path, "y", np.full((6, 3), 1 / 3))
    both = score("both", "x + x * y", tmp_path, units(by_rows=False), range(3))
    alone = score("alone", "x", tmp_path, units(by_rows=False), range(3))
    assert both is not None
    assert alone is not None
    assert len(both.folds[0].exponents) == 2
    assert both.probabilities == pytest.approx(alone.probabilities, abs=1e-3), "equal probabilities say nothing"
    assert score("other", "x + z", tmp_path, units(by_rows=False), range(3)) is None


def test_a_temperature_is_the_best_of_the_validation_notes() -> None:
    from folds_scores import fit_exponents

    from medlit.evaluation.calibration import at_temperature, fit_temperature, power_product

    rng = np.random.default_rng(0)
    probabilities, truth = rng.dirichlet(np.ones(4), 200), rng.integers(0, 4, 200)
    probabilities[np.arange(200), truth] += 0.5
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = np.eye(4, dtype=np.bool_)[truth]
    exponents = fit_exponents([np.log(probabilities)], labels, labels)
    assert 1 / exponents[0] == pytest.approx(fit_temperature(probabilities, truth), rel=1e-2)
    wanted = at_temperature(probabilities, 1 / exponents[0])
    assert power_product([np.log(probabilities)], exponents) == pytest.approx(wanted, abs=1e-6)


def _options(llama: Path, tmp_path: Path, rows: list[dict[str, str]]) -> argparse.Namespace:
    tiny = f"--model.language_model.base_model {llama} --model.language_model.max_length 112 --trainer.accelerator cpu"
    tiny += " --data.batching.global_batch_size 8 --data.batching.micro_batch_size 4 --data.label_conflicts merge"
    shared = {"source": str(write_csv(tmp_path / "notes.csv", rows)), "folder": tmp_path / "folds", "folds": 3}
    shared |= {"near_threshold": 0.95, "data": f"{tiny} --model.optimizer.learning_rate 2e-2", "jobs": 1}
    shared |= {"only_folds": None, "compiled": None, "ends": time.monotonic() + 1e6, "score": "rows", "recipes": {}}
    return argparse.Namespace(**shared)


@pytest.mark.slow
def test_folds_answer_every_note_once_and_are_compared(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import folds

    rows = [row for split in notes().values() for row in split]
    options = _options(llama, tmp_path, rows)
    steps = "--trainer.max_steps 6"
    variants = {"first": steps, "broken": "--model.lora.r 0", "second": f"{steps} --model.lora.r 8"}
    variants |= {"tfidf": "", "majority": "", "head": steps}
    folds.run_all(options, variants)
    assert capsys.readouterr().err.count("exit code 2") == 3, "and the others are none the worse for it"
    del variants["broken"]
    units = folds.read_units(options)
    options.recipes = {"blend": "first + second * tfidf"}
    found = folds.collect(options, variants, units)

    # What a process did before leaves nothing behind: in a fresh one a later task gives the same.
    alone = argparse.Namespace(**vars(options) | {"folder": tmp_path / "alone"})
    folds.run_one(alone, "second", variants["second"], 1)
    place = Path("second", "fold_1", "test_answers.parquet")
    assert (alone.folder / place).read_bytes() == (options.folder / place).read_bytes()

    systems = {row["system"]: row for row in found["systems"]}
    assert set(systems) == {"medlit_135m", "tfidf", "majority", "head", "blend"}
    assert {row["n"] for row in systems.values()} == {found["notes"]} == {len(rows)}
    assert all(row["log_loss"] > 0 for row in systems.values())
    assert [one["against"] for one in found["differences"]] == ["tfidf", "majority", "head", "blend"]
    told = [note["transcription"] for note in rows]
    for path in options.folder.rglob("*"):
        assert path.suffix not in (".ckpt", ".safetensors")
        assert not path.is_file() or not any(text.encode() in path.read_bytes() for text in told), path
    capsys.readouterr()
    folds.select(options, variants, units)
    assert capsys.readouterr().out.count("| first |") == 1
    assert json.loads((options.folder / "select.json").read_text())["systems"][0]["system"] == "first"


@pytest.mark.parametrize(
    ("settings", "rare", "steps"),
    [({"data.batching.class_balance": "inverse"}, 12, 3), ({"trainer.max_steps": -1, "trainer.max_epochs": 2}, 6, 6)],
    ids=["balance", "epochs"],
)
def test_the_head_trains_on_the_notes_that_the_run_does(
    llama: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    rare: int,
    steps: int,
) -> None:
    """As many steps, and as many notes of a rare specialty: 3 of 24, or half if specialties are balanced."""
    import torch
    from folds import read_data
    from peers import head

    from medlit.tools.baseline import BaselineData

    rows = [row | {"medical_specialty": HEART if i < 3 else BONE} for i, row in enumerate(notes()["train"])]
    folder = write_notes(tmp_path / "notes")
    for split in ("train", "validation", "test"):
        write_csv(folder / f"{split}.csv", rows)
    seen: list[int] = []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(scores: Any, labels: Any, **options: Any) -> Any:  # noqa: ANN401 - PyTorch's signature
        seen.append(int((labels == sorted((HEART, BONE)).index(HEART)).sum()))
        return cross_entropy(scores, labels, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    given = {"data.source": folder, "trainer.default_root_dir": tmp_path, "trainer.max_steps": 3}
    config, data = read_data(["--config", str(tiny_config), *(f"--{k}={v}" for k, v in (given | settings).items())])
    found = head(BaselineData.read(data, None), data, config, [])
    assert len(seen) == steps * 2, "8 notes a step in 2 micro-batches"
    assert sum(seen) == rare
    assert {split: each.shape for split, each in found.items()} == {"validation": (24, 2), "test": (24, 2)}
    assert all(each.sum(axis=1) == pytest.approx(1) for each in found.values())


def test_the_head_trains_adapter_and_head_in_float32_and_reads_the_last_token(llama: Path) -> None:
    import torch
    from peers import load_head

    from medlit.model.settings import LanguageModel, Lora

    model = load_head(LanguageModel(str(llama)), Lora(), 3, 0, torch.device("cpu")).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".score." in name for name in trained)
    assert any(".score." in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    ids = torch.tensor([[1, 40, 41, 42]])
    padded = torch.tensor([[1, 40, 41, 42, 0, 0], [1, 9, 8, 7, 6, 5]])
    mask = (padded > 0).long()
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        together = model(input_ids=padded, attention_mask=mask).logits[0]
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
