"""Optimizer steps whose gradient is not finite stop the fit, or are skipped."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from compare import curves, last_checkpoint
from fakes import notes
from lightning.pytorch.plugins.precision import Precision
from processes import Ranks, write_config, write_forty

from medlit.callbacks.nonfinite import MAX_CONSECUTIVE_SKIPS, SKIPPED_STEPS
from medlit.data.collate import Batch
from medlit.model.module import SpecialtyClassifier

if TYPE_CHECKING:
    from conftest import Medlit

Spoil = Callable[[float, range], list[torch.Tensor]]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Multiply the loss of some optimizer steps, counted from 1; returns the weights before each step."""
    return functools.partial(spoil_steps, monkeypatch)


def spoil_steps(patch: pytest.MonkeyPatch, value: float, steps: range) -> list[torch.Tensor]:
    step, seen = SpecialtyClassifier.training_step, []

    def training_step(self: SpecialtyClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        first = next(p for n, p in self.named_parameters() if "lora_A" in n)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            seen.append(first.detach().clone())
        loss = step(self, batch, batch_idx)
        return loss * value if self.global_step + 1 in steps else loss

    patch.setattr(SpecialtyClassifier, "training_step", training_step)
    return seen


def signal_in(patch: pytest.MonkeyPatch, number: int) -> None:
    """Send this process SIGTERM in an optimizer step, counted from 1, before its gradient is computed."""
    step = SpecialtyClassifier.training_step

    def training_step(self: SpecialtyClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step + 1 == number and batch_idx % self.trainer.accumulate_grad_batches == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    patch.setattr(SpecialtyClassifier, "training_step", training_step)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_step_stops_the_fit(
    run_medlit: Medlit,
    spoil: Spoil,
    tiny_config: Path,
    tmp_path: Path,
    value: float,
) -> None:
    spoil(value, range(6, 7))
    run = tmp_path / "version_0"
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    message = outcome.err.splitlines()[-1]
    assert message.startswith("medlit: model.optimizer.on_nonfinite: step 6 (notes train-")
    assert "Traceback" not in outcome.err
    named = message.partition("(notes ")[2].partition(")")[0].split(", ")
    assert len(named) == 8
    assert set(named) <= {note["id"] for note in notes()["train"]}
    assert f"the last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in message
    assert last_checkpoint(run)["global_step"] == 4


def test_a_nonfinite_step_is_neither_validated_nor_written(
    run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path
) -> None:
    """With a validation after every step."""
    spoil(float("nan"), range(3, 4))
    run = tmp_path / "version_0"
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run, "--val_every_steps", "1")
    assert outcome.code == 2
    assert "model.optimizer.on_nonfinite: step 3 (notes train-" in outcome.err.splitlines()[-1]
    for name in ("last", "best"):
        saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] <= 2
        assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert last_checkpoint(run)["global_step"] == 2
    validated = [name.rpartition("/")[2] for name in curves(run) if name.startswith("val/loss/")]
    assert validated == ["0", "1"], "steps count from 0 there"


@pytest.mark.parametrize("every", [1, 4])
def test_a_signal_in_a_nonfinite_step_writes_nothing_of_it(
    run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    spoil(float("nan"), range(6, 7))
    signal_in(monkeypatch, 6)
    run = tmp_path / "version_0"
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run, "--val_every_steps", every)
    assert outcome.code == 2
    assert "model.optimizer.on_nonfinite: step 6 (notes train-" in outcome.err.splitlines()[-1]
    assert "SIGTERM" not in outcome.err
    saved = last_checkpoint(run)
    assert saved["global_step"] == (5 if every == 1 else 4)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_a_signal_in_a_skipped_step_stops_after_it(
    run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spoil(float("nan"), range(6, 7))
    run, skip = tmp_path / "version_0", ["--model.optimizer.on_nonfinite", "skip"]
    with monkeypatch.context() as patch:
        signal_in(patch, 6)
        outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run, *skip)
    assert outcome.code == 128 + signal.SIGTERM
    assert "SIGTERM after step 6; last.ckpt is written" in outcome.err
    saved = last_checkpoint(run)
    assert saved["global_step"] == 6
    assert any(torch.equal(weight, seen[5]) for weight in saved["state_dict"].values()), "as before the step"
    assert run_medlit("fit", "--config", tiny_config, "--run_dir", run, *skip, "--ckpt_path", "last").code == 0
    assert curves(run)[f"{SKIPPED_STEPS}/10"] == 1.0


@pytest.mark.parametrize("policy", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_two_processes_decide_alike_on_a_nonfinite_step(
    ranks: Ranks, tiny_config: Path, tmp_path: Path, policy: str
) -> None:
    """One of them has the notes whose loss is not finite, and the other gets the signal."""
    config, run = write_config(tmp_path / "two.yaml", tiny_config, write_forty(tmp_path)), tmp_path / "run"

    def prepare(rank: int) -> None:
        patch = pytest.MonkeyPatch()
        if rank == 1:
            spoil_steps(patch, float("nan"), range(2, 3))
        else:
            signal_in(patch, 2)

    flags = ["--config", config, "--run_dir", run, "--val_every_steps", 1, "--model.optimizer.on_nonfinite", policy]
    codes = ranks(2, "fit", *flags, prepare=prepare)
    saved = last_checkpoint(run)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    if policy == "stop":
        assert codes == [2, 2], ranks.log(0)
        assert saved["global_step"] == 1
        assert "SIGTERM" not in ranks.log(0)
        for rank in range(2):
            assert ranks.log(rank).count("model.optimizer.on_nonfinite: step 2 (notes ") <= 1
        message = ranks.log(0).splitlines()[-1]
        assert f" and {32 - 8} more) is not valid" in message, "of both"
        assert f"the last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in message
    else:
        assert codes == [128 + signal.SIGTERM, 0], ranks.log(0)
        assert saved["global_step"] == 2
        assert "SIGTERM after step 2; last.ckpt is written" in ranks.log(0)


def test_the_message_says_if_there_is_no_checkpoint_yet(
    run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path
) -> None:
    spoil(float("nan"), range(1, 2))
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0")
    assert outcome.code == 2
    assert "step 1 (notes " in outcome.err
    assert "there is no checkpoint yet" in outcome.err


def test_nonfinite_steps_are_skipped_and_counted_on_request(
    run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path
) -> None:
    seen = spoil(float("nan"), range(3, 5))
    run = tmp_path / "version_0"
    skip = ["--model.optimizer.on_nonfinite", "skip"]
    assert run_medlit("fit", "--config", tiny_config, "--run_dir", run, *skip).code == 0
    assert [bool(torch.equal(seen[i], seen[i + 1])) for i in range(6)] == [False, False, True, True, False, False]
    assert last_checkpoint(run)["global_step"] == 11
    counted = {name: value for name, value in curves(run).items() if name.startswith(SKIPPED_STEPS)}
    assert counted == {f"{SKIPPED_STEPS}/{step}": 1.0 if step == 2 else 2.0 for step in range(2, 11)}
    assert json.loads((run / "fit_metrics.json").read_text())["loss"] > 0


def test_a_fit_that_skips_every_step_ends(run_medlit: Medlit, spoil: Spoil, tiny_config: Path, tmp_path: Path) -> None:
    spoil(float("nan"), range(1, 100))
    skip = ["--model.optimizer.on_nonfinite", "skip", "--trainer.max_steps", "60", "--val_every_steps", "60"]
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0", *skip)
    assert outcome.code == 2
    assert f"step {MAX_CONSECUTIVE_SKIPS + 1} (notes " in outcome.err
    assert f"as for the {MAX_CONSECUTIVE_SKIPS} steps before it" in outcome.err


def test_an_overflow_of_a_scaled_loss_is_no_error(
    run_medlit: Medlit,
    spoil: Spoil,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under float16 the gradient scaler skips such a step itself, and lowers its scale."""
    monkeypatch.setattr(Precision, "scaler", object(), raising=False)
    spoil(float("inf"), range(2, 3))
    run = tmp_path / "version_0"
    assert run_medlit("fit", "--config", tiny_config, "--run_dir", run).code == 0
    assert curves(run)[f"{SKIPPED_STEPS}/1"] == 1.0


def test_nonfinite_weights_are_not_written(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = SpecialtyClassifier.on_validation_epoch_end

    def broken(self: SpecialtyClassifier) -> None:
        end(self)
        if self.global_step == 8:
            next(p for p in self.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(SpecialtyClassifier, "on_validation_epoch_end", broken)
    run = tmp_path / "version_0"
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    assert "is not written, since 1 weights after step 8" in outcome.err
    assert last_checkpoint(run)["global_step"] == 8, "as it was before the validation"
    assert all(value.isfinite().all() for value in last_checkpoint(run)["state_dict"].values())
