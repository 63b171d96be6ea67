"""When numbers go wrong: a gradient that is not finite, a GPU that is full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compare import curves, last_checkpoint
from fakes import make_datamodule, notes
from lightning.pytorch.plugins.precision import Precision

from medlit.callbacks.memory import advice
from medlit.callbacks.nonfinite import MOST_IN_A_ROW, SKIPPED_STEPS
from medlit.data.collate import Batch
from medlit.model.memory import GIB, Footprint
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import LanguageModel

if TYPE_CHECKING:
    from conftest import Medlit

Spoil = Callable[[float, range], list[torch.Tensor]]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Make the loss of some optimizer steps, counted from 1, another one; returns the weights seen at each step."""

    def spoil(value: float, steps: range) -> list[torch.Tensor]:
        step, seen = SpecialtyClassifier.training_step, []

        def training_step(self: SpecialtyClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
            first = next(p for n, p in self.named_parameters() if "lora_A" in n)
            if batch_idx % self.trainer.accumulate_grad_batches == 0:
                seen.append(first.detach().clone())
            loss = step(self, batch, batch_idx)
            return loss * value if self.global_step + 1 in steps else loss

        monkeypatch.setattr(SpecialtyClassifier, "training_step", training_step)
        return seen

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_no_number_stops_the_fit(
    medlit: Medlit,
    spoil: Spoil,
    tiny_config: Path,
    tmp_path: Path,
    value: float,
) -> None:
    spoil(value, range(6, 7))
    run = tmp_path / "version_0"
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    said = outcome.err.splitlines()[-1]
    assert said.startswith("medlit: model.optimizer.on_nonfinite: step 6 (notes train-")
    assert "Traceback" not in outcome.err
    named = said.partition("(notes ")[2].partition(")")[0].split(", ")
    assert len(named) == 8
    assert set(named) <= {note["id"] for note in notes()["train"]}
    assert f"the last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in said
    assert last_checkpoint(run)["global_step"] == 4


def test_before_any_checkpoint_it_says_so(medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path) -> None:
    spoil(float("nan"), range(1, 2))
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0")
    assert outcome.code == 2
    assert "step 1 (notes " in outcome.err
    assert "there is no checkpoint yet" in outcome.err


def test_or_is_skipped_and_counted(medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path) -> None:
    seen = spoil(float("nan"), range(3, 5))
    run = tmp_path / "version_0"
    skip = ["--model.optimizer.on_nonfinite", "skip"]
    assert medlit("fit", "--config", tiny_config, "--run_dir", run, *skip).code == 0
    assert [bool(torch.equal(seen[i], seen[i + 1])) for i in range(6)] == [False, False, True, True, False, False]
    assert last_checkpoint(run)["global_step"] == 11
    counted = {name: value for name, value in curves(run).items() if name.startswith(SKIPPED_STEPS)}
    assert counted == {f"{SKIPPED_STEPS}/{step}": 1.0 if step == 2 else 2.0 for step in range(2, 11)}
    assert json.loads((run / "fit_metrics.json").read_text())["loss"] > 0


def test_a_fit_that_skips_everything_ends(medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path) -> None:
    spoil(float("nan"), range(1, 100))
    skip = ["--model.optimizer.on_nonfinite", "skip", "--trainer.max_steps", "60", "--val_every_steps", "60"]
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0", *skip)
    assert outcome.code == 2
    assert f"step {MOST_IN_A_ROW + 1} (notes " in outcome.err
    assert f"as for the {MOST_IN_A_ROW} steps before it" in outcome.err


def test_an_overflow_of_a_scaled_loss_is_no_fault(
    medlit: Medlit,
    spoil: Spoil,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under float16 the scaler leaves such a step out by itself, and seeks a smaller scale."""
    monkeypatch.setattr(Precision, "scaler", object(), raising=False)
    spoil(float("inf"), range(2, 3))
    run = tmp_path / "version_0"
    assert medlit("fit", "--config", tiny_config, "--run_dir", run).code == 0
    assert curves(run)[f"{SKIPPED_STEPS}/1"] == 1.0


def test_weights_that_are_no_numbers_are_not_written(
    medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = SpecialtyClassifier.on_validation_epoch_end

    def broken(self: SpecialtyClassifier) -> None:
        end(self)
        if self.global_step == 8:
            next(p for p in self.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(SpecialtyClassifier, "on_validation_epoch_end", broken)
    run = tmp_path / "version_0"
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    assert "is not written, since 1 weights after step 8" in outcome.err
    assert last_checkpoint(run)["global_step"] == 8, "as it was before the validation"
    assert all(value.isfinite().all() for value in last_checkpoint(run)["state_dict"].values())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            "training_step",
            "data.batching.micro_batch_size: the GPU's memory does not suffice for training; set"
            " data.batching.micro_batch_size to 2",
        ),
        ("validation_step", "data.batching.eval_batch_size: the GPU's memory does not suffice for answering; set"),
        ("configure_model", "model.language_model.base_model: "),
    ],
)
def test_a_full_gpu_is_told_in_a_sentence(
    medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, says: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SpecialtyClassifier, method, full)
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0")
    assert outcome.code == 2
    said = outcome.err.splitlines()[-1]
    assert said.startswith(f"medlit: {says}"), outcome.err
    assert "Traceback" not in outcome.err


def test_a_gpu_that_is_full_in_the_middle_of_a_fit_is_told_with_the_last_checkpoint(
    medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SpecialtyClassifier.training_step

    def full(self: SpecialtyClassifier, *rest: Any) -> torch.Tensor:  # noqa: ANN401
        if self.global_step == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *rest)

    monkeypatch.setattr(SpecialtyClassifier, "training_step", full)
    run = tmp_path / "version_0"
    outcome = medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    assert outcome.err.endswith(f" The last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}.\n")
    assert last_checkpoint(run)["global_step"] == 4


def test_the_advice_names_what_there_is_to_change() -> None:
    data = make_datamodule(batching={"micro_batch_size": 8, "eval_batch_size": 1})
    kept = advice("training", LanguageModel(gradient_checkpointing="none"), data, weights=6, peak=78, total=80)
    assert "78.0 of 80.0 GiB" in kept
    assert "data.batching.micro_batch_size to 4 (about 42.0 GiB or more)" in kept
    assert "model.language_model.max_length to 1024 (about 42.0 GiB or more)" in kept
    assert "model.language_model.gradient_checkpointing to 'unsloth' (about 11.0 GiB or more)" in kept
    takes = Footprint(layers=32, fixed=6 * GIB, kept=108 * 1024, entry=8192, work=114_688)  # an 8B Llama's
    auto = advice("training", LanguageModel(), data, 6, 78, 80, takes)
    assert (
        "set model.language_model.memory_budget_gib to 70.2, or data.batching.micro_batch_size to 4 (about 9.7 GiB"
        " or more)" in auto
    )
    crowded = advice("training", LanguageModel(), data, 6, 12, 80, takes)
    assert "memory_budget_gib" not in crowded, "one layer alone takes more"
    assert "memory_budget_gib" not in advice("answering", LanguageModel(), data, 6, 78, 80, takes)
    least = LanguageModel(gradient_checkpointing="unsloth")
    assert "gradient_checkpointing" not in advice("training", least, data, 6, 78, 80)
    single = advice("answering", LanguageModel(), data, 6, 78, 80)
    assert "data.batching.eval_batch_size to" not in single
    assert "set model.language_model.max_length to 1024" in single
