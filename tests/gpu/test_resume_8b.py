"""An interrupted fit of the 8B shape continues in a new process as if uninterrupted, and a full GPU gives advice.

LLAMA_TOKENIZER=folder pytest -m gpu -s tests/gpu/test_resume_8b.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from compare import last_checkpoint, scalars
from interrupt import fit_until_sigterm, free_memory

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS, STOP = 6, 3
BUDGET = 10  # GiB
# Peaks of training alone; the last step is validated always, and after its last point.
FLAGS = ["--trainer.max_steps", STEPS, "--val_every_steps", STEPS, "--trainer.num_sanity_val_steps", 0]
FLAGS += ["--model.language_model.memory_budget_gib", BUDGET]


class Runs(NamedTuple):
    """Run folders of the fit that nobody stopped, and of the one that was stopped after three steps."""

    whole: Path
    stopped: Path


@pytest.fixture(scope="module")
def runs(main_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.cli.cli import main

    folder = tmp_path_factory.mktemp("resume")
    found = Runs(folder / "whole", folder / "stopped")
    settings = [*main_job, *map(str, FLAGS)]
    main(["fit", *settings, "--run_dir", str(found.whole)])
    free_memory()
    fit_until_sigterm(settings, found.stopped, STOP)
    return found


def weights(run: Path) -> Any:  # noqa: ANN401 - a tensor; torch is imported late
    """All trained weights as one vector."""
    import torch

    state = last_checkpoint(run)["state_dict"]
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def test_it_continues_in_a_new_process_as_if_uninterrupted(runs: Runs, main_job: list[str], tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    shutil.copytree(runs.stopped, run)
    command = [sys.executable, "-m", "medlit", "fit", *main_job, *FLAGS, "--run_dir", run, "--ckpt_path", "last"]
    resumed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]

    whole, after = scalars(runs.whole, "train/loss"), scalars(run, "train/loss")
    before = max(scalars(runs.whole, "train/peak_gib"))
    peak_after = max(scalars(run, "train/peak_gib")[STOP:])
    there, start, here = weights(runs.whole), weights(runs.stopped), weights(run)
    travelled, apart = float((there - start).norm()), float((there - here).norm())
    print(f"\nlosses uninterrupted {[round(x, 4) for x in whole]}\nlosses resumed       {[round(x, 4) for x in after]}")
    print(f"peak GiB uninterrupted {before:.3f}, resumed {peak_after:.3f}")
    print(
        f"adapters apart {apart:.4f}: {apart / travelled:.1%} of what steps {STOP + 1} to {STEPS} changed,"
        f" {apart / float(there.norm()):.2%} of the adapter"
    )
    assert len(whole) == len(after) == STEPS
    assert after[STOP:] == pytest.approx(whole[STOP:], rel=0.02)
    # Adam's step hardly depends on a gradient's size, so that where there is little of it rounding decides; the notes
    # of other steps, or an optimizer that forgot, would be as far away as the steps went.
    assert apart < 0.3 * travelled
    assert peak_after <= 1.02 * before


LIMITED = """
import sys
import torch
from medlit.__main__ import main
from medlit.unsloth_first import import_unsloth
import_unsloth()
_, total = torch.cuda.mem_get_info()
torch.cuda.set_per_process_memory_fraction(24 * 2**30 / total)
main()
"""


def test_a_full_gpu_names_what_to_change_and_where_to_continue(
    runs: Runs, main_job: list[str], long_notes: Path, tmp_path: Path
) -> None:
    """24 GiB of it, all 32 notes of a step in one micro-batch, and every layer's activations kept: some 90 GiB."""
    run = tmp_path / "full"
    shutil.copytree(runs.stopped, run)
    kept = (run / "checkpoints" / "last.ckpt").read_bytes()
    greedy = ["--model.language_model.gradient_checkpointing", "none", "--data.batching.micro_batch_size", 32]
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "fit",
        *main_job,
        *FLAGS,
        *greedy,
        "--run_dir",
        run,
        "--ckpt_path",
        "last",
    ]
    full = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    said = full.stderr.splitlines()[-1]
    print(f"\n{said}")
    assert full.returncode == 2, full.stderr[-2000:]
    assert "Traceback" not in full.stderr
    assert said.startswith("medlit: data.batching.micro_batch_size: the GPU's memory is too small for training (")
    for what in (
        "data.batching.micro_batch_size to 16",
        "model.language_model.max_length to 1024",
        "model.language_model.gradient_checkpointing to 'unsloth'",
    ):
        assert what in said
    assert f"The last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}." in said
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == kept
    output, table = full.stdout + full.stderr, long_notes.read_text()
    assert not any(output[start : start + 40] in table for start in range(0, len(output) - 40, 10))
