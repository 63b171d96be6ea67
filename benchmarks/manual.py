"""Time of `medlit fit --help` beside a bare LightningCLI.

    python benchmarks/manual.py

Both are processes of their own, in turns, with everything in the disk's cache after a first round that does not count.
Reported are medians, and the median of the rounds' ratios. Nearly all of the time goes into Lightning's imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

_BARE = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel
LightningCLI(DemoModel, BoringDataModule, args=["fit", "--help"])
"""
SYSTEMS = {"LightningCLI": ["-c", _BARE], "medlit": ["-m", "medlit", "fit", "--help"]}


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of a process that must succeed."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    took: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for turn in range(rounds + 1):
        for name in list(SYSTEMS)[:: 1 if turn % 2 else -1]:
            took[name].append(seconds(SYSTEMS[name]))
    kept = {name: times[1:] for name, times in took.items()}
    ratios = [b / a for a, b in zip(kept["LightningCLI"], kept["medlit"], strict=True)]
    print(
        json.dumps(
            {
                "seconds": {name: round(statistics.median(times), 2) for name, times in kept.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    )


if __name__ == "__main__":
    main()
