"""The throughput counts real tokens, its own time and nothing of validation or compilation; the bar counts notes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medlit.callbacks import throughput
from medlit.callbacks.throughput import NOTES_PER_SECOND, PADDING, TOKENS_PER_SECOND, ProgressLog, Throughput
from medlit.data.collate import Batch

if TYPE_CHECKING:
    from conftest import Medlit


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Logger:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


def batch(*lengths: int) -> Batch:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(ids, nothing, nothing, list(lengths), 1, [str(n) for n in lengths])


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """A fit of steps of two micro-batches, each of which takes so many seconds."""
    clock, callback, logger = Clock(), Throughput(steps=3), Logger()
    monkeypatch.setattr(throughput, "time", clock)
    trainer = SimpleNamespace(global_step=0, world_size=2, log_every_n_steps=1, loggers=[logger], precision="32")
    trainer.callback_metrics, trainer.progress_bar_metrics = {"train/loss": torch.tensor(0.5)}, {}
    module = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]

    def step(seconds: float, *micro_batches: Batch) -> None:
        for i, micro_batch in enumerate(micro_batches):
            callback.on_train_batch_start(trainer, module, micro_batch, i)  # type: ignore[arg-type]
            clock.now += seconds
            trainer.global_step += i == len(micro_batches) - 1
            callback.on_train_batch_end(trainer, module, None, micro_batch, i)  # type: ignore[arg-type]

    return SimpleNamespace(step=step, clock=clock, callback=callback, logger=logger, trainer=trainer, module=module)


def test_rates_are_of_real_tokens_over_all_micro_batches_and_processes(fit: Any) -> None:  # noqa: ANN401
    fit.step(1.0, batch(10, 6), batch(4))
    rates = fit.callback.rates
    assert rates[TOKENS_PER_SECOND] == pytest.approx(2 * 20 / 2)
    assert rates[NOTES_PER_SECOND] == pytest.approx(2 * 3 / 2)
    assert rates[PADDING] == pytest.approx(1 - 20 / 24)
    assert fit.logger.logged == [(0, rates)]


def test_its_curves_lie_over_that_of_the_loss(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    monitor = "--trainer.callbacks+=LearningRateMonitor"  # which logs every micro-batch
    assert run_medlit("fit", "--config", tiny_config, monitor, "--run_dir", tmp_path / "run").code == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = ["train/loss", TOKENS_PER_SECOND, NOTES_PER_SECOND, PADDING, "lr-AdamW8bit"]
    loss, *others = [sorted({event.step for event in events.Scalars(tag)}) for tag in tags]
    assert len(loss) > 1
    assert all(steps == loss for steps in others)


def test_the_first_step_compiles_and_is_left_out_as_soon_as_there_is_another(fit: Any) -> None:  # noqa: ANN401
    fit.step(100.0, batch(10), batch(10))
    assert fit.callback.rates[TOKENS_PER_SECOND] == pytest.approx(2 * 0.1)
    fit.step(1.0, batch(10), batch(10))
    assert fit.callback.rates[TOKENS_PER_SECOND] == pytest.approx(2 * 10)


def test_old_steps_fall_out_of_the_mean(fit: Any) -> None:  # noqa: ANN401
    for seconds in (1.0, 50.0, 1.0, 1.0, 1.0):
        fit.step(seconds, batch(10), batch(10))
    assert fit.callback.rates[TOKENS_PER_SECOND] == pytest.approx(2 * 10)


def test_a_validation_does_not_count(fit: Any) -> None:  # noqa: ANN401
    for _ in range(3):
        fit.step(1.0, batch(10), batch(10))
        fit.callback.on_validation_start(fit.trainer, fit.module)
        fit.clock.now += 1000.0
    assert fit.callback.rates[TOKENS_PER_SECOND] == pytest.approx(2 * 10)


@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
def test_the_progress_bar_counts_notes_and_shows_notes_a_second(
    run_medlit: Medlit, run: Path, tiny_config: Path, verb: str
) -> None:
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--data.batching.eval_batch_size", "3"]
    shown = run_medlit(verb, *arguments, "--trainer.enable_progress_bar", "true").out
    last = [line for line in shown.replace("\r", "\n").splitlines() if "notes/s" in line][-1]
    assert "| 8/8 [" in last


@pytest.mark.parametrize(
    ("shown", "given", "bars"),
    [
        ("true", [], ["ProgressBar"]),
        ("null", [], []),  # standard output is no terminal
        ("true", ["RichProgressBar"], ["RichProgressBar"]),
        ("null", ["TQDMProgressBar"], ["TQDMProgressBar"]),
        ("false", ["RichProgressBar", "LearningRateMonitor"], []),
        ("false", [], []),
    ],
)
def test_a_progress_bar_that_the_user_names_replaces_medlit_s(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, given: list[str], bars: list[str]
) -> None:
    from lightning.pytorch.callbacks import progress

    from medlit.cli.cli import MedlitCLI

    monkeypatch.setattr(L.Trainer, "fit", functools.wraps(L.Trainer.fit)(lambda *_, **__: None))
    monkeypatch.chdir(tmp_path)
    added = [f"--trainer.callbacks+={name}" for name in given]
    trainer = MedlitCLI(["fit", "--config", str(tiny_config), "--trainer.enable_progress_bar", shown, *added]).trainer
    assert [type(each).__name__ for each in trainer.callbacks if isinstance(each, progress.ProgressBar)] == bars
    assert not bars or type(trainer.callbacks[-1]).__name__ == bars[0], (
        "so that it shows the loss of the step that ended"
    )
    assert [type(each).__name__ for each in trainer.callbacks].count("LearningRateMonitor") == given.count(
        "LearningRateMonitor"
    )


def test_a_rich_progress_bar_in_a_yaml_shows_a_fit(run_medlit: Medlit, tiny_config: Path, tmp_path: Path) -> None:
    bar = tmp_path / "bar.yaml"
    bar.write_text("trainer: {enable_progress_bar: null, callbacks: {class_path: RichProgressBar}, max_steps: 1}")
    outcome = run_medlit("fit", "--config", tiny_config, "--config", bar, "--run_dir", tmp_path / "run")
    assert outcome.code == 0


# --- in a log ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of progress as often as there is a new tenth."""
    monkeypatch.setattr(throughput, "LOG_SECONDS", 0)


@pytest.mark.usefixtures("impatient")
def test_a_fit_in_a_log_shows_its_steps_and_no_line_of_its_validations(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path
) -> None:
    flags = ["--trainer.enable_progress_bar", "null", "--run_dir", tmp_path / "run"]
    outcome = run_medlit("fit", "--config", tiny_config, *flags)
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if " left" in line]
    form = r"medlit: step (\d+): loss \d+\.\d{3}, [\d,]+ tokens/s, \d\d:\d\d left"
    steps = [int(found[1]) for line in lines if (found := re.fullmatch(form, line))]
    assert len(steps) == len(lines), lines
    assert steps == sorted(set(steps))
    assert 2 <= len(steps) <= 10
    assert max(steps) < 11, "the last step has the line of its validation"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
def test_an_evaluation_in_a_log_shows_its_batches(run_medlit: Medlit, run: Path, tiny_config: Path, verb: str) -> None:
    flags = ["--trainer.enable_progress_bar", "null", "--data.batching.eval_batch_size", "3", "--ckpt_path", "best"]
    outcome = run_medlit(verb, "--config", tiny_config, *flags)
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if " left" in line]
    form = rf"medlit: {verb}: batch ([1-7]) of 8, \d\d:\d\d left"
    batches = [int(found[1]) for line in lines if (found := re.fullmatch(form, line))]
    assert len(batches) == len(lines) > 1, lines
    assert batches == sorted(set(batches))


def in_a_log(monkeypatch: pytest.MonkeyPatch, last: float, seconds: float, *others: L.Callback) -> list[int]:
    """Steps of a fit that print a line; each takes some seconds."""
    clock, told = Clock(), list[str]()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "tell", told.append)
    rates, log = Throughput(), ProgressLog()
    rates.rates = {TOKENS_PER_SECOND: 7.0}
    state = SimpleNamespace(fn=SimpleNamespace(value="fit"))
    trainer = SimpleNamespace(global_step=0, training=True, state=state, estimated_stepping_batches=last)
    trainer.callbacks, trainer.callback_metrics = [rates, *others], {"train/loss": torch.tensor(1.5)}
    for _ in range(int(min(last, 1000))):
        clock.now += seconds
        trainer.global_step += 1
        log.on_train_batch_end(trainer)  # type: ignore[arg-type]
    return [int(line.split()[1].strip(":").replace(",", "")) for line in told]


@pytest.mark.parametrize(
    ("last", "seconds", "steps"),
    [
        (60, 0.1, []),  # over before a line is due
        (120, 2.5, [13, 25, 37, 49, 61, 73, 85, 97, 109]),
        (120, 1.0, [31, 61, 91]),
        (1000, 36.0, [2, *range(101, 1000, 100)]),
    ],
)
def test_lines_in_a_log_are_few(monkeypatch: pytest.MonkeyPatch, last: int, seconds: float, steps: list[int]) -> None:
    assert in_a_log(monkeypatch, last, seconds) == steps


def test_the_number_of_steps_is_asked_for_only_when_a_line_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = list[float](), Clock()

    class Trainer:
        global_step, training, callbacks = 0, True, ()
        state = SimpleNamespace(fn=SimpleNamespace(value="fit"))

        @property
        def estimated_stepping_batches(self) -> int:
            asked.append(clock.now)
            return self.global_step

    monkeypatch.setattr(throughput, "time", clock)
    trainer, log = Trainer(), ProgressLog()
    for clock.now in range(throughput.LOG_SECONDS + 1):
        trainer.global_step += 1
        log.on_train_batch_end(trainer)  # type: ignore[arg-type]
    assert asked == [throughput.LOG_SECONDS]


def test_lines_of_a_fit_that_a_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(duration={"hours": 1})
    monkeypatch.setattr(timer, "time_remaining", lambda: 3636 - throughput.time.perf_counter())
    steps = in_a_log(monkeypatch, float("inf"), 36.0, timer)
    assert steps[:5] == [2, 11, 21, 31, 41]
