"""A fit that is stopped at any optimizer step and resumed ends like an uninterrupted one, to the bit."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from compare import differences, last_checkpoint

from medlit.callbacks.last_checkpoint import ValidateLastStep
from medlit.evaluation.metrics import LOGGED

if TYPE_CHECKING:
    from conftest import Medlit

STEPS, INTERVAL = 10, 4  # 3 steps an epoch

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    r"ignore:.*isinstance\(treespec, LeafSpec\)",
)


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny fit with an adapter wide enough for 8-bit optimizer states, and with dropout."""
    settings = yaml.safe_load(tiny_config.read_text())
    settings["trainer"]["max_steps"] = STEPS
    settings["val_every_steps"] = INTERVAL
    settings["model"] |= {"lora": {"r": 64, "dropout": 0.1}, "decoding": {"max_new_tokens": 2}}
    settings["model"]["optimizer"] |= {"schedule": "cosine"}
    path = tmp_path_factory.mktemp("resume") / "resume.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    from medlit.cli.cli import main

    run = tmp_path_factory.mktemp("whole") / "version_0"
    main(["fit", "--config", str(config), "--run_dir", str(run)])
    return run


def same(ours: Path, theirs: Path) -> None:
    assert not differences(ours, theirs)


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int, during: str) -> None:
    """Send this process a signal after an optimizer step: at its end, or in the validation that follows."""
    hook = getattr(ValidateLastStep, during)

    def hook_and_signal(self: ValidateLastStep, trainer: Any, *rest: Any) -> None:  # noqa: ANN401
        hook(self, trainer, *rest)
        if trainer.global_step == step and not trainer.fit_loop._should_accumulate():
            monkeypatch.setattr(ValidateLastStep, during, hook)
            signal.raise_signal(number)

    monkeypatch.setattr(ValidateLastStep, during, hook_and_signal)


def stop_and_resume(
    run_medlit: Medlit, config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, stops: list[tuple[int, int, str]]
) -> None:
    arguments = ["fit", "--config", config, "--run_dir", run]
    for step, number, during in stops:
        signal_after(monkeypatch, step, number, during)
        before = signal.getsignal(number)  # a shell starts what it does not wait for with SIGINT ignored
        outcome = run_medlit(*arguments)
        assert outcome.code == 128 + number, outcome.err
        message = outcome.err.splitlines()[-1]
        assert message.startswith(f"medlit: {signal.Signals(number).name} after step {step}; last.ckpt is written")
        assert last_checkpoint(run)["global_step"] == step
        assert signal.getsignal(number) == before
        arguments = shlex.split(message.partition("this continues: medlit ")[2])
    assert run_medlit(*arguments).code == 0


TRAINING, VALIDATION = "on_train_batch_end", "on_validation_batch_end"


@pytest.mark.parametrize(
    "stops",
    [
        [(3, signal.SIGTERM, TRAINING), (7, signal.SIGUSR1, TRAINING)],
        [(4, signal.SIGINT, TRAINING), (8, signal.SIGTERM, VALIDATION)],
        [(1, signal.SIGUSR2, TRAINING), (10, signal.SIGTERM, VALIDATION)],
    ],
    ids=["an epoch's end, mid-epoch", "before and in a validation", "the first step, in the last validation"],
)
def test_a_fit_stopped_twice_ends_like_an_uninterrupted_one(
    run_medlit: Medlit,
    config: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: list[tuple[int, int, str]],
) -> None:
    run = tmp_path / "version_0"
    stop_and_resume(run_medlit, config, run, monkeypatch, stops)
    same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("during", [TRAINING, VALIDATION])
def test_a_fit_stopped_at_every_step_ends_like_an_uninterrupted_one(
    run_medlit: Medlit, config: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    steps = range(1, STEPS) if during == TRAINING else (4, 8, 10)
    for step in steps:
        run = tmp_path / str(step) / "version_0"
        stop_and_resume(run_medlit, config, run, monkeypatch, [(step, signal.SIGTERM, during)])
        same(run, whole)
    run = tmp_path / "all" / "version_0"
    stop_and_resume(run_medlit, config, run, monkeypatch, [(step, signal.SIGTERM, during) for step in steps])
    same(run, whole)


def test_a_complete_fit_is_not_resumed(run_medlit: Medlit, config: Path, whole: Path) -> None:
    outcome = run_medlit("fit", "--config", config, "--run_dir", whole, "--ckpt_path", "last")
    assert outcome.code == 2
    assert f"trainer.max_steps: the checkpoint has been trained for {STEPS} steps" in outcome.err


def test_flags_override_the_rates_in_a_checkpoint(
    run_medlit: Medlit, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "version_0"
    signal_after(monkeypatch, 3, signal.SIGTERM, TRAINING)
    assert run_medlit("fit", "--config", config, "--run_dir", run).code == 143
    before = last_checkpoint(run)
    flags = ("--model.optimizer.learning_rate", 1e-3, "--model.optimizer.weight_decay", 0.5)
    signal_after(monkeypatch, 4, signal.SIGTERM, TRAINING)
    assert run_medlit("fit", "--config", config, "--run_dir", run, "--ckpt_path", "last", *flags).code == 143
    after = last_checkpoint(run)
    groups = after["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5] * len(groups)
    assert after["lr_schedulers"][0]["base_lrs"][0] == 1e-3
    assert 0 < groups[0]["lr"] < 1e-3 < before["optimizer_states"][0]["param_groups"][0]["lr"]


def test_a_moved_run_keeps_its_best_checkpoint(
    run_medlit: Medlit, config: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worse one replaces it."""
    run = tmp_path / "version_0"
    signal_after(monkeypatch, 9, signal.SIGTERM, TRAINING)
    assert run_medlit("fit", "--config", config, "--run_dir", run).code == 143
    run = run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    best = (run / "checkpoints" / "best.ckpt").stat().st_mtime_ns
    monkeypatch.setattr("medlit.model.metrics.SpecialtyMetrics.scores", _no_better)
    assert run_medlit("fit", "--config", config, "--run_dir", "moved", "--ckpt_path", "last").code == 0
    assert (run / "checkpoints" / "best.ckpt").stat().st_mtime_ns == best


def _no_better(_: object) -> dict[str, Any]:
    return dict.fromkeys(LOGGED, 0.0) | {"f1_macro": -1.0, "invalid_rate": 1.0, "n": 8} | NOTHING


NOTHING: dict[str, Any] = {"per_class": {"Neurology": {}}, "confusion": [[0, 8]]}
