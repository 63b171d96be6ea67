"""Stop a fit after some steps, as a cluster does, and free its memory; for tests that resume it."""

from __future__ import annotations

import gc
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import last_checkpoint


def fit_until_sigterm(arguments: Sequence[str], run: Path, step: int) -> None:
    """Run a fit in `run` that gets SIGTERM after an optimizer step, and check that it wrote its state there."""
    from medlit.callbacks.last_checkpoint import ValidateLastStep
    from medlit.cli.cli import main

    hook = ValidateLastStep.on_train_batch_end

    def stop(self: ValidateLastStep, trainer: Any, *rest: Any) -> None:  # noqa: ANN401
        hook(self, trainer, *rest)
        if trainer.global_step == step and not trainer.fit_loop._should_accumulate():
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidateLastStep, "on_train_batch_end", stop)
        with pytest.raises(SystemExit) as ended:
            main(["fit", *arguments, "--run_dir", str(run)])
    assert ended.value.code == 128 + signal.SIGTERM
    del ended  # its traceback holds the model
    free_memory()
    assert last_checkpoint(run)["global_step"] == step


def free_memory() -> None:
    """Free what a fit in this process held."""
    gc.collect()
    torch.cuda.empty_cache()
