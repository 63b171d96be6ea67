"""The average of the weights: what a validation answers with and what is kept, while training goes on without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compare import last_checkpoint
from torch import Tensor

from medlit.callbacks.average import WeightAverage

if TYPE_CHECKING:
    from conftest import Medlit

DECAY = 0.6
Weights = dict[str, Tensor]


def averages(trained: list[Weights]) -> list[Weights]:
    """The plain mean of the first steps, then an exponential one."""
    kept: list[Weights] = []
    for step, weights in enumerate(trained):
        keep = min(DECAY, step / (step + 1))
        kept.append({k: keep * kept[-1][k] + (1 - keep) * v if kept else v for k, v in weights.items()})
    return kept


def close(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in ours)


def test_it_answers_with_the_average_and_trains_as_without_it(
    medlit: Medlit, tiny_config: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Weights] = []
    answered: dict[int, Weights] = {}
    update, swap = WeightAverage.on_train_batch_end, WeightAverage.on_validation_start

    def weights(module: Any) -> Weights:  # noqa: ANN401
        return {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}

    def note_step(self: WeightAverage, trainer: Any, module: Any, *rest: Any) -> None:  # noqa: ANN401
        update(self, trainer, module, *rest)
        if not trainer.fit_loop._should_accumulate():
            trained.append(weights(module))

    def note_answers(self: WeightAverage, trainer: Any, module: Any) -> None:  # noqa: ANN401
        swap(self, trainer, module)
        answered[trainer.global_step] = weights(module)

    monkeypatch.setattr(WeightAverage, "on_train_batch_end", note_step)
    monkeypatch.setattr(WeightAverage, "on_validation_start", note_answers)
    run = tmp_path / "version_0"
    flags = ("--config", tiny_config, "--run", run, "--model.optimizer.average_decay", DECAY)
    assert medlit("fit", *flags).code == 0

    means = averages(trained)
    assert sorted(answered) == [4, 8, 11]
    assert all(close(kept, means[step - 1]) for step, kept in answered.items())
    # Training saw nothing of it: the last weights are those of the fit without an average.
    last = last_checkpoint(run)
    assert close(last["callbacks"]["WeightAverage"]["other"], last_checkpoint(fitted)["state_dict"])
    # And what is kept is what was validated.
    assert close(last["state_dict"], means[-1])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert close(best["state_dict"], means[best["global_step"] - 1])


def test_a_fit_that_goes_on_without_an_average_goes_on_from_the_weights_themselves(
    medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    plain, run = tmp_path / "plain" / "version_0", tmp_path / "averaged" / "version_0"
    to_8 = ("--trainer.max_steps", 8, "--model.optimizer.schedule", "constant")
    to_11 = ("--trainer.max_steps", 11, "--model.optimizer.schedule", "constant", "--ckpt_path", "last")
    assert medlit("fit", "--config", tiny_config, "--run", plain, *to_8).code == 0
    assert medlit("fit", "--config", tiny_config, "--run", plain, *to_11).code == 0
    averaged = ("--model.optimizer.average_decay", DECAY)
    assert medlit("fit", "--config", tiny_config, "--run", run, *to_8, *averaged).code == 0
    assert medlit("fit", "--config", tiny_config, "--run", run, *to_11).code == 0
    assert close(last_checkpoint(run)["state_dict"], last_checkpoint(plain)["state_dict"])
    assert "WeightAverage" not in last_checkpoint(run)["callbacks"]
