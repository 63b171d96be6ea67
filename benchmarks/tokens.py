"""Speed-up of tokenizing notes on all cores.

    python benchmarks/tokens.py [--notes 4000] [--rounds 3]

The same table of invented notes, as long as real ones, goes through the data module's tokenizing (prompts, Arrow, no
cache) on one core, as Unsloth's import leaves a process, and on all of them, in turns. Reported are medians, and
the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapes import write_notes

RESULTS = Path(__file__).parent / "results" / "tokens.json"
SYSTEMS = {"one core": "false", "all cores": "true"}  # TOKENIZERS_PARALLELISM


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both alternately and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base_model", default="builtin:smollm2-135m", help="base model whose tokenizer is used")
    parser.add_argument("--notes", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    from datasets import Dataset

    from medlit.atomic_io import write_json
    from medlit.base_model import load_tokenizer
    from medlit.data.prompt import AlpacaPrompt
    from medlit.data.tokenise import tokenise
    from medlit.unsloth_first import TOKENIZERS_PARALLELISM

    prompt = AlpacaPrompt(load_tokenizer(options.base_model, None))
    with tempfile.TemporaryDirectory() as folder:
        table = write_notes(Path(folder), prompt.tokenizer, options.notes, len(prompt.header) + len(prompt.footer))
        notes = Dataset.from_json(str(table / "train.jsonl"), cache_dir=folder, keep_in_memory=True)
    notes = notes.rename_column("medical_specialty", "specialty")
    notes = notes.add_column("specialties", [[name] for name in notes["specialty"]])
    took: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    lengths: list[int] = []
    for turn in range(-1, options.rounds):  # the first is not counted
        for name in list(SYSTEMS)[:: 1 if turn % 2 else -1]:
            os.environ[TOKENIZERS_PARALLELISM] = SYSTEMS[name]
            begin = time.perf_counter()
            lengths = tokenise(notes, prompt, cached=False)["length"][:]
            if turn >= 0:
                took[name].append(time.perf_counter() - begin)
    ratios = [one / every for one, every in zip(*took.values(), strict=True)]
    results: dict[str, Any] = {
        "hardware": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "notes": len(notes),
        "tokens_a_note": round(sum(lengths) / len(lengths)),
        "milliseconds_a_note": {
            name: round(1000 * statistics.median(times) / len(notes), 3) for name, times in took.items()
        },
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    print(f"{results['hardware']}, {len(notes)} notes of {results['tokens_a_note']} tokens")
    print("| one core, ms a note | all cores | times as fast (rounds) |")
    print("| --- | --- | --- |")
    one, every = results["milliseconds_a_note"].values()
    print(f"| {one} | {every} | {results['ratio']} ({min(results['ratios'])} to {max(results['ratios'])}) |")
    write_json(options.output, results)


if __name__ == "__main__":
    main()
