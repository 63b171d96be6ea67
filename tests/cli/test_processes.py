"""Several processes do what one does: the same gradient, the same numbers, each note once, each file written by one.

The processes are forks of this one, which has imported everything, and find one another as those of `srun` do.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from commands import FAILING, environment, seconds_since_failure
from compare import curves, far, last_checkpoint
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from processes import (
    DDP,
    SLURM,
    STEPS,
    Ranks,
    keep_first_gradient,
    write_config,
    write_forty,
)

from medlit.callbacks.last_checkpoint import LastCheckpoint
from medlit.callbacks.signals import SIGNALS, StopOnSignal
from medlit.cli.environment import clean_up_on_failure
from medlit.data.collate import Batch
from medlit.errors import UserError
from medlit.model.module import SpecialtyClassifier

if TYPE_CHECKING:
    from conftest import Medlit


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    return write_config(folder / "processes.yaml", tiny_config, write_forty(folder))


@pytest.mark.parametrize(
    ("size", "step", "nodes", "cluster"),
    [
        (2, 32, None, []),
        pytest.param(3, 24, None, [], marks=pytest.mark.slow),
        pytest.param(4, 32, 2, SLURM, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_test_and_predict_as_one(
    run_medlit: Medlit,
    ranks: Ranks,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    step: int,
    nodes: int | None,
    cluster: list[object],
) -> None:
    run, alone = tmp_path / "several", tmp_path / "alone"
    settings = ["--config", config, "--data.batching.global_batch_size", step]
    with monkeypatch.context() as patch:
        patch.setattr(SpecialtyClassifier, "on_before_optimizer_step", SpecialtyClassifier.on_before_optimizer_step)
        keep_first_gradient(tmp_path / "gradient.pt")
        assert run_medlit("fit", *settings, "--run_dir", alone).code == 0

    assert ranks(size, "fit", *settings, *cluster, "--run_dir", run, nodes=nodes) == [0] * size, ranks.log(0)
    one = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert all(far(ranks.gradient(rank), one) < 1e-5 for rank in range(size))
    points, theirs = curves(run), curves(alone)
    assert points.keys() == theirs.keys()
    assert all(points[name] == pytest.approx(theirs[name], abs=1e-3) for name in points)
    hands = [ranks.written(rank, tmp_path / "several") for rank in range(size)]
    assert {Path(path).name for path in hands[0]} >= {"last.ckpt", "best.ckpt", "fit_metrics.json", "config_fit.yaml"}
    assert not any(hands[1:]), "the first process writes, and no other"

    # From one checkpoint, so that nothing is left to rounding in training.
    saved = ["--config", config, "--ckpt_path", alone / "checkpoints" / "best.ckpt", "--run_dir"]
    assert run_medlit("test", *saved, alone).code == 0
    assert ranks(size, "test", *saved, run, *cluster, nodes=nodes) == [0] * size, ranks.log(0)
    ours, theirs_ = (json.loads((place / "test_metrics.json").read_text()) for place in (run, alone))
    assert ours.pop("loss") == pytest.approx(theirs_.pop("loss"), abs=1e-5)
    assert ours == theirs_
    assert ours["n"] == 5

    assert run_medlit("predict", *saved, alone, "--data.predict.source", "validation").code == 0
    asked = [*saved, run, "--data.predict.source", "validation", *cluster]
    assert ranks(size, "predict", *asked, nodes=nodes) == [0] * size, ranks.log(0)
    assert (run / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
    assert list(pd.read_csv(run / "predictions.csv")["id"]) == [f"validation {i}" for i in range(7)]
    parts = [ranks.written(rank, run) for rank in range(size)]
    assert all(not one & other for i, one in enumerate(parts) for other in parts[:i]), "one writer a file"
    assert not list(run.glob(".*"))


def test_a_number_of_processes_that_does_not_divide_a_step_is_refused(
    ranks: Ranks, config: Path, tmp_path: Path
) -> None:
    assert ranks(3, "fit", "--config", config, "--run_dir", tmp_path / "run") == [2, 2, 2]
    assert (
        "data.batching.global_batch_size: 32 notes per optimizer step cannot be shared evenly by 3 processes"
        in ranks.log(0)
    )


@pytest.mark.parametrize(
    ("failing", "error"), [(0, UserError("the mistake of one")), (1, RuntimeError("the bug of one"))]
)
def test_when_one_fails_the_others_stop(
    ranks: Ranks, config: Path, tmp_path: Path, failing: int, error: Exception
) -> None:
    def prepare(rank: int) -> None:
        step = SpecialtyClassifier.training_step

        def training_step(self: SpecialtyClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
            if rank == failing and self.global_step == 1:
                raise error
            return step(self, batch, batch_idx)

        SpecialtyClassifier.training_step = training_step  # type: ignore[method-assign]

    began = time.monotonic()
    codes = ranks(2, "fit", "--config", config, "--run_dir", tmp_path / "run", prepare=prepare)
    assert time.monotonic() - began < 60
    assert codes[failing] == (2 if isinstance(error, UserError) else 1)
    assert str(error) in ranks.log(failing)
    assert codes[1 - failing] != 0


def test_adapters_that_no_note_reaches_are_refused(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        start = SpecialtyClassifier.on_train_start

        def on_train_start(self: SpecialtyClassifier) -> None:
            start(self)
            for name, module in self.model.named_modules():
                if name.endswith("layers.1.mlp"):
                    module.forward = lambda hidden: hidden

        SpecialtyClassifier.on_train_start = on_train_start  # type: ignore[method-assign]

    assert ranks(2, "fit", "--config", config, "--run_dir", tmp_path / "run", prepare=prepare) == [2, 2], ranks.log(0)
    assert "medlit: model.lora.target_modules: a step has not used all adapters" in ranks.log(0)
    assert "Traceback" not in ranks.log(0)


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_stop_after_the_same_step_whichever_gets_the_signal(
    ranks: Ranks, config: Path, tmp_path: Path, told: int
) -> None:
    def prepare(rank: int) -> None:
        hook = SpecialtyClassifier.on_before_optimizer_step

        def tell(self: SpecialtyClassifier, optimizer: torch.optim.Optimizer) -> None:
            hook(self, optimizer)
            if rank == told and self.global_step == 1:
                signal.raise_signal(signal.SIGUSR1)

        SpecialtyClassifier.on_before_optimizer_step = tell  # type: ignore[method-assign]

    arguments = ["fit", "--config", config, "--run_dir", tmp_path / "run"]
    codes = ranks(2, *arguments, prepare=prepare)
    assert codes[1] == 0
    assert codes[0] in (128 + signal.SIGUSR1, 128 + signal.SIGTERM), ranks.log(0)
    assert "after step 2; last.ckpt is written" in ranks.log(0)
    assert last_checkpoint(tmp_path / "run")["global_step"] == 2
    assert ranks(2, *arguments, "--ckpt_path", "last") == [0, 0], ranks.log(0)
    assert last_checkpoint(tmp_path / "run")["global_step"] == STEPS


def test_a_failure_ends_the_processes_that_this_one_started(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "100"])
    with pytest.raises(RuntimeError, match="a bug"), clean_up_on_failure(trainer_with(child), tmp_path):
        raise RuntimeError("a bug")
    assert child.wait() == -signal.SIGKILL


def test_a_failing_process_does_not_wait_for_the_others_to_destroy_the_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With NCCL that waits until all of them do; a test without GPUs can only see that it is not called."""
    at_exit: list[object] = [_destroy_dist_connection]
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    with pytest.raises(RuntimeError, match="a bug"), clean_up_on_failure(trainer_with(), tmp_path):
        raise RuntimeError("a bug")
    assert not at_exit


def trainer_with(*children: subprocess.Popen[bytes]) -> Any:  # noqa: ANN401 - what medlit reads of a trainer
    """A trainer that has started other processes."""
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=1 + len(children), num_nodes=1)
    launcher.procs = list(children)
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), is_global_zero=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_not_forwarded(number: int) -> None:
    """A terminal has sent it to the other processes too, which would take a second one as the last word."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    child = subprocess.Popen(["sleep", "100"])
    stop = StopOnSignal(LastCheckpoint())
    module: Any = None
    try:
        stop.on_train_start(trainer_with(child), module)
        stop.on_before_optimizer_step()
        signal.raise_signal(number)
        time.sleep(0.2)
        assert stop.received == number
        assert child.poll() is None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        child.kill()
        child.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("has_progress", [False, True])
def test_a_signal_before_the_first_step_ends_the_process(number: int, has_progress: bool) -> None:
    """Sent to a process group, it has ended the processes that compile kernels, and PyTorch waits for these forever."""
    ended: list[int] = []
    before = {each: signal.getsignal(each) for each in SIGNALS}
    module: Any = None
    try:
        signal.signal(number, lambda each, frame: ended.append(each))
        stop = StopOnSignal(LastCheckpoint())
        stop.on_train_start(trainer_with(), module)
        if has_progress:
            stop.on_before_optimizer_step()
        signal.raise_signal(number)
        assert ended == ([] if has_progress else [number])
        signal.raise_signal(number)
        assert ended[-1:] == [number]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "does", "codes", "says"),
    [
        (0, "bug", {1}, "ValueError: the bug of one"),
        (0, "mistake", {2}, "medlit: the mistake of one"),
        # Either the first process loses its partner, or Lightning kills it.
        (1, "bug", {1, -9}, "ValueError: the bug of one"),
        (1, "mistake", {1, -9}, "medlit: the mistake of one"),
        (1, "SIGKILL", {1, -9}, ""),
    ],
)
def test_when_one_fails_lightning_s_own_processes_stop(
    config: Path, tmp_path: Path, failing: int, does: str, codes: set[int], says: str
) -> None:
    """As started by one command; its output ends when the last process that could write to it has."""
    done = started_by_one(config, tmp_path, failing, does)
    assert done.returncode in codes, done.stderr
    assert says in done.stderr
    assert seconds_since_failure(done.stdout) < 60


@pytest.mark.slow
@pytest.mark.parametrize("does", ["SIGINT to all", "SIGINT"], ids=["a terminal to all", "one to the first"])
def test_ctrl_c_saves_and_stops_lightning_s_own_processes(config: Path, tmp_path: Path, does: str) -> None:
    done = started_by_one(config, tmp_path, 0, does)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "medlit: SIGINT after step 2; last.ckpt is written" in done.stderr
    assert "Traceback" not in done.stderr
    assert last_checkpoint(tmp_path / "run")["global_step"] == 2


def started_by_one(config: Path, folder: Path, rank: int, does: str) -> subprocess.CompletedProcess[str]:
    """A fit by two processes of which Lightning starts the second; one of them does something in the second step."""
    command = [sys.executable, FAILING, "fit", "--config", config, "--run_dir", folder / "run", *DDP, "2"]
    where = environment() | {"FAILURE": f"{rank}:{does}"}
    return subprocess.run(
        list(map(str, command)), env=where, capture_output=True, text=True, timeout=200, start_new_session=True
    )
