"""Launchers: torchrun and SLURM, on one host and on two; no process waits for a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import FAILING, environment, seconds_since_failure
from compare import curves
from processes import (
    SLURM,
    Ranks,
    by_srun,
    write_config,
    write_forty,
)

from medlit.data.collate import Batch
from medlit.model.module import SpecialtyClassifier

if TYPE_CHECKING:
    from conftest import Medlit

# Two dashes come after it: without them torchrun takes --run_dir as short for one of its options.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
LIMIT = 200.0  # seconds


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    return write_config(folder / "launchers.yaml", tiny_config, write_forty(folder))


def run_folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "launchers").iterdir())


def assert_as_one(run_medlit: Medlit, config: Path, root: Path) -> None:
    """There is one run folder, and in it the curves that one process draws."""
    assert run_folders(root) == ["version_0"]
    assert run_medlit("fit", "--config", config, "--run_dir", root / "alone").code == 0
    ours, theirs = curves(root / "launchers" / "version_0"), curves(root / "alone")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], abs=1e-3) for name in ours)


def run(command: list[object], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), env=environment() | variables, capture_output=True, text=True, timeout=LIMIT
    )


@pytest.mark.slow
def test_torchrun_starts_a_fit(run_medlit: Medlit, config: Path, tmp_path: Path) -> None:
    """With a cache that nobody has filled: both processes do."""
    where = ["--config", config, "--trainer.default_root_dir", tmp_path]
    done = run(
        [*TORCHRUN, "-m", "--", "medlit", "fit", *where, *TWO], UNSLOTH_COMPILE_LOCATION=str(tmp_path / "compiled")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_as_one(run_medlit, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "does", "says"),
    [(1, "SIGKILL", "Signal 9"), (0, "bug", "bug of one")],
)
def test_torchrun_ends_when_one_fails(config: Path, tmp_path: Path, failing: int, does: str, says: str) -> None:
    """Its output ends when the last process that could write to it has."""
    command = [*TORCHRUN, "--", FAILING, "fit", "--config", config, "--run_dir", tmp_path / "run", *TWO]
    done = run(command, FAILURE=f"{failing}:{does}")
    assert done.returncode == 1, done.stderr
    assert says in done.stderr
    assert seconds_since_failure(done.stdout) < 60


@pytest.mark.slow
def test_srun_starts_a_fit(run_medlit: Medlit, config: Path, tmp_path: Path) -> None:
    where = ["--config", config, "--trainer.default_root_dir", tmp_path, *SLURM, "--trainer.num_nodes", 1]
    command = [sys.executable, "-m", "medlit", "fit", *where]
    started = [
        subprocess.Popen(list(map(str, command)), env=environment() | place, stderr=subprocess.PIPE, text=True)
        for place in by_srun(size=2, nodes=1)
    ]
    said = [process.communicate(timeout=LIMIT)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_as_one(run_medlit, config, tmp_path)


def dies(signal_or_error: int | Exception, failing: int) -> Callable[[int], None]:
    """What makes one of several processes fail in its second step."""

    def prepare(rank: int) -> None:
        step = SpecialtyClassifier.training_step

        def training_step(self: SpecialtyClassifier, batch: Batch, batch_idx: int):  # noqa: ANN202
            if rank == failing and self.global_step == 1:
                print("failed", time.time(), flush=True)
                if isinstance(signal_or_error, Exception):
                    raise signal_or_error
                os.kill(os.getpid(), signal_or_error)
            return step(self, batch, batch_idx)

        SpecialtyClassifier.training_step = training_step  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    ("reason", "code"), [(signal.SIGKILL, -signal.SIGKILL), (RuntimeError("the bug of one"), 1)], ids=["killed", "bug"]
)
def test_one_that_fails_on_the_second_of_two_hosts_ends_all(
    ranks: Ranks, config: Path, tmp_path: Path, reason: int | Exception, code: int
) -> None:
    """Without what `srun --kill-on-bad-exit` does; the run folder is one."""
    where = ["--config", config, "--trainer.default_root_dir", tmp_path / "logs", *SLURM]
    codes = ranks(4, "fit", *where, nodes=2, prepare=dies(reason, failing=3))
    assert codes[3] == code
    assert all(codes), "nobody takes it for a success"
    assert seconds_since_failure(ranks.log(3)) < 60
    assert run_folders(tmp_path / "logs") == ["version_0"]


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_the_first_process_chooses_the_run_folder_for_all(
    ranks: Ranks, config: Path, tmp_path: Path, verb: str
) -> None:
    """A host may not see yet what another has made: to it the next number is another one."""

    def prepare(rank: int) -> None:
        from medlit import run_folder

        if rank == 1:
            run_folder.next_version = lambda root, name: root / name / "version_7"

    where = ["--config", config, "--trainer.default_root_dir", tmp_path, "--data.predict.source", "validation"]
    assert ranks(2, verb, *where, prepare=prepare) == [0, 0], ranks.log(0) + ranks.log(1)
    assert run_folders(tmp_path) == ["version_0"]


@pytest.mark.slow
def test_all_processes_use_the_folder_that_the_first_one_claims(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    """Another fit takes the number between the choice and the claim."""

    def prepare(rank: int) -> None:
        from medlit import run_folder

        claim = run_folder.claim
        run_folder.claim = lambda folder, numbered: (claim(folder, numbered), claim(folder, numbered))[1]

    where = ["--config", config, "--trainer.default_root_dir", tmp_path / "logs"]
    assert ranks(2, "fit", *where, prepare=prepare) == [0, 0], ranks.log(0) + ranks.log(1)
    assert run_folders(tmp_path / "logs") == ["version_0", "version_1"]
    taken, ours = (tmp_path / "logs" / "launchers" / f"version_{number}" for number in (0, 1))
    assert not list(taken.iterdir())
    assert {path.name for path in ours.iterdir()} >= {"checkpoints", "adapter", "config_fit.yaml", "split.parquet"}
    assert any(path.name.startswith("events.out.tfevents") for path in ours.iterdir())
    assert not ranks.written(1, tmp_path / "logs")
    assert ranks(2, "test", *where, "--ckpt_path", "best") == [0, 0], ranks.log(0)
    assert (ours / "report.html").is_file()


WRONG = [
    ({}, "trainer.plugins: SLURMEnvironment needs processes that srun starts, and $SLURM_NTASKS is not set"),
    ({"SLURM_NTASKS_PER_NODE": None}, "give sbatch --ntasks-per-node instead of --ntasks."),
    (
        {"SLURM_NTASKS_PER_NODE": "4"},
        "trainer.devices, trainer.num_nodes: You set `devices=2` in Lightning, but the number of tasks per",
    ),
    (
        {"SLURM_NNODES": "1"},
        "trainer.devices, trainer.num_nodes: You set `num_nodes=2` in Lightning, but the number of nodes configured",
    ),
]


@pytest.mark.parametrize(("changed", "says"), WRONG, ids=["no srun", "no number", "other tasks", "other nodes"])
def test_srun_and_config_must_agree(
    run_medlit: Medlit,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
    says: str,
) -> None:
    place = by_srun(size=4, nodes=2)[0] | changed if changed else {}
    for name, value in place.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    done = run_medlit("fit", "--config", config, *SLURM, "--trainer.default_root_dir", tmp_path / "logs")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "logs").exists()
