r"""Time the optimizer steps of `medlit fit` as a user runs it, of any version of medlit.

    python benchmarks/steps.py --name now --output FILE fit --config configs/llama31_8b.yaml \
        --config configs/models/smollm2_135m.yaml --data.source notes.csv --trainer.max_steps 120 \
        --trainer.num_sanity_val_steps 0 --trainer.limit_val_batches 1 --val_every_steps 1000
    git worktree add OLD COMMIT
    PYTHONPATH=OLD/src python benchmarks/steps.py --name then --output FILE fit --config OLD/configs/llama31_8b.yaml ...

Runs add rows to one file: the median seconds of a step after ten of warm-up, and how many were timed. The clock waits
for the GPU once a step.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
sys.path.append(str(HERE.parent / "src"))  # after PYTHONPATH

import lightning.pytorch as pl  # noqa: E402
from clocked_fit import add_row  # noqa: E402

WARM_UP = 10


class Clock(pl.Callback):
    """Notes when each optimizer step ends, and adds the row when the fit does."""

    def __init__(self, name: str, output: Path) -> None:
        self.name, self.output = name, output
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """After the micro-batch that ends a step."""
        import torch

        if trainer.global_step > len(self.ends):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def on_train_end(self, *_: object) -> None:
        """Add the row."""
        seconds = [end - begin for begin, end in zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 :], strict=False)]
        if seconds:
            row = {"name": self.name, "seconds_per_step": round(statistics.median(seconds), 4), "steps": len(seconds)}
            add_row(self.output, row, ("name",))

    on_exception = on_train_end  # a fit that a signal stops


def main() -> None:
    """Run the command with the clock among its callbacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the row")
    parser.add_argument("--output", type=Path, required=True)
    options, command = parser.parse_known_args()
    create = pl.Trainer.__init__

    @functools.wraps(create)  # whose settings the command line shows
    def with_clock(self: pl.Trainer, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - passed on
        create(self, *args, **settings)
        self.callbacks.append(Clock(options.name, options.output))  # type: ignore[attr-defined]

    pl.Trainer.__init__ = with_clock  # type: ignore[method-assign]
    sys.argv = ["medlit", *command]
    runpy.run_module("medlit", run_name="__main__")


if __name__ == "__main__":
    main()
