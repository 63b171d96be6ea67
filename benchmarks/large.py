"""Train a 70B on one large GPU, compare its memory with the estimate, and estimate a 405B.

    LLAMA_TOKENIZER=folder python benchmarks/large.py --folder DIR     one GPU of 80 GB, DIR with 45 GB free, 5 minutes
    python benchmarks/large.py --table benchmarks/results/large.json   the result for README.md
    python benchmarks/large.py --tiny --folder DIR --output FILE.json  a two-layer model on the CPU, a minute

A Llama of the 70B's shape is written with random weights, a layer at a time and in 4 bits, as its repository on the Hub
holds it. `medlit fit` with `configs/models/llama31_70b.yaml` then trains it for three steps of 32 notes as long as real
ones, with a clock beside it; the estimate by which the fit chooses how many layers are computed again is held against
the measured peak. The table at the end is the doctor's estimates, from the configurations alone.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

from clocked_fit import describe, fit, parser, say  # noqa: E402

GIB = 2**30
STEPS, NOTES = 3, 32
# Notes per micro-batch, as in the two configs; a packed one has that many times the mean tokens of `shapes.py`.
# An evaluation's batch is bounded by its token budget, which is as many times the longest note.
BATCHES = {"8B": 8, "70B": 4, "405B": 1}
MEAN_TOKENS, LONGEST = 779, 2048


def main(argv: list[str] | None = None) -> None:
    """Measure, or show a result."""
    options = parser(__doc__, HERE / "results" / "large.json").parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        result = measure(Path(scratch), options.tiny)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def measure(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Write the model, train it, and add the estimates."""
    import torch

    result = describe("CPU" if tiny else torch.cuda.get_device_name())
    weights = scratch / "llama"
    # In a separate process, so that its GPU memory is free again afterwards.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        other.submit(write, weights, tiny).result()
    size = sum(path.stat().st_size for path in weights.iterdir()) / 1e9
    result["weights_gb"] = round(size, 1)
    say(f"{size:.1f} GB of weights written")
    result["trained"] = train(scratch, weights, tiny)
    say(json.dumps(result["trained"]))
    result["estimates"] = {size: estimate(size) for size in BATCHES}
    return result


def write(weights: Path, tiny: bool) -> None:
    """The weights and their tokenizer."""
    from shapes import llama_config, llama_tokenizer, write_llama_4bit

    if tiny:
        from fakes import write_llama
        from transformers import LlamaConfig

        write_llama(weights)
        write_llama_4bit(weights, LlamaConfig.from_pretrained(weights), "cpu")
        (weights / "model.safetensors").unlink()
        return
    weights.mkdir()
    llama_tokenizer().save_pretrained(weights)
    write_llama_4bit(weights, llama_config("70B"), "cuda")


def train(scratch: Path, weights: Path, tiny: bool) -> dict[str, Any]:
    """Time three steps of `medlit fit`."""
    from shapes import write_notes

    from medlit.base_model import load_tokenizer

    shrink = 8 if tiny else 1
    notes = write_notes(scratch / "notes", load_tokenizer(str(weights)), STEPS * NOTES, 66 // shrink, shrink)
    begin = time.perf_counter()
    trainer = {"max_steps": STEPS, "logger": False}
    (clock,) = fit(scratch, ["models/llama31_70b.yaml"], weights, notes, trainer, tiny=tiny)
    found = {
        "seconds": [round(second, 2) for second in clock["seconds"]],
        "tokens": clock["tokens"],
        "largest_micro_batch": clock["largest"],
        "layers_kept": clock["layers_kept"],
        "minutes_with_loading_and_validation": round((time.perf_counter() - begin) / 60, 1),
    }
    if "peak_bytes" in clock:
        found["peak_gib"] = round(clock["peak_bytes"] / GIB, 2)
        found["estimated_gib"] = round(clock["estimated_bytes"] / GIB, 2)
    return found


def estimate(size: str) -> dict[str, float]:
    """Minimum GiB of a Llama, with all layers but one recomputed."""
    import torch
    from shapes import llama_config

    from medlit.model.fit_memory import fit_memory
    from medlit.model.settings import LanguageModel, Lora

    notes = BATCHES[size]
    needed = fit_memory(
        llama_config(size),
        LanguageModel(gradient_checkpointing="unsloth", offload="none"),
        Lora(),
        notes * MEAN_TOKENS,
        notes * LONGEST,
        torch.device("cuda"),
        torch.bfloat16,
    )
    parts = {name: getattr(needed, name) for name in ("weights", "adapter", "training", "evaluation", "total")}
    return {name: round(value / GIB, 2) for name, value in parts.items()}


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    trained = result["trained"]
    rate = trained["tokens"][-1] / trained["seconds"][-1]
    low, high = trained["layers_kept"] or ("all", "all")
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        f"{result['weights_gb']} GB of 4-bit weights; three steps took {', '.join(map(str, trained['seconds']))} s"
        f" ({rate:,.0f} tokens/s in the last), with {low} to {high} layers kept;"
        f" {trained['minutes_with_loading_and_validation']} minutes with loading and a validation.",
    ]
    if "peak_gib" in trained:
        off = trained["estimated_gib"] / trained["peak_gib"] - 1
        lines += [
            f"Peak {trained['peak_gib']} GiB, estimated by the fit {trained['estimated_gib']} GiB ({off:+.1%}).",
        ]
    lines += [
        "",
        "| Llama 3.1 | 4-bit weights | adapter, optimizer | training, at the least | or answering | in all, GiB |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {size} | {row['weights']} | {row['adapter']} | {row['training']} | {row['evaluation']} | {row['total']} |"
        for size, row in result["estimates"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
