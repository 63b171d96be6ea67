"""Compare the loss curves of packed and padded training, with a second seed of each for scale.

    python benchmarks/curve.py --output FILE.json              on a GPU, four minutes; the figure is FILE.png
    python benchmarks/curve.py --steps 4 --output FILE.json    on a CPU, some minutes

The pretrained 135M Llama is fine-tuned on the invented notes by one config, four times: packed and padded, each with
two seeds of the adapter. Every fit takes the same 32 notes in the same step. How far packed and padded are apart is
read beside how far two seeds of one way are, which are equally right.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import sys
import tempfile
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "curve.json"
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
SEEDS = (3407, 1)
WINDOW = 5  # steps that a smoothed point is the mean of
# The recipe's steps of 32 notes in 4 micro-batches; one batch of validation, which the last step always has.
FLAGS = (
    "--trainer.logger true --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    " --trainer.limit_val_batches 1 --data.batching.global_batch_size 32 --data.batching.micro_batch_size 8"
    " --model.optimizer.learning_rate 5e-4"
)


def fit(run: Path, options: argparse.Namespace, *, packed: bool, seed: int) -> list[float]:
    """Fine-tune and return the loss of each optimizer step."""
    from medlit.cli.cli import main as medlit

    settings = ["--config", str(options.config), *FLAGS.split(), *options.flags.split()]
    settings += ["--trainer.max_steps", str(options.steps), "--val_every_steps", str(options.steps)]
    settings += ["--data.batching.packing", str(packed).lower(), "--model.lora.seed", str(seed), "--run_dir", str(run)]
    medlit(["fit", *settings])
    gc.collect()  # the next model is not to stand beside this one
    return losses(run)


def losses(run: Path) -> list[float]:
    """Training loss of each step, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def smoothed(curve: np.ndarray) -> np.ndarray:
    """Means of `WINDOW` consecutive steps."""
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.ones(window) / window, mode="valid")


def gap(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How far one curve is from another, relative to it."""
    found = {}
    for name, (one, other) in {
        "step": (np.array(ours), np.array(theirs)),
        "smoothed": (smoothed(np.array(ours)), smoothed(np.array(theirs))),
    }.items():
        apart = np.abs(one - other) / other
        found |= {f"largest_{name}": float(apart.max()), f"mean_{name}": float(apart.mean())}
    return found


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Plot both curves of the first seed, and faintly those of the second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (way, color), seed in product((("padded", "tab:orange"), ("packed", "tab:blue")), SEEDS):
        curve = curves[name_of(way, seed)]
        strong = seed == SEEDS[0]
        style = "-" if way == "padded" else "--"
        label = f"{way}, {'first' if strong else 'second'} seed"
        axes.plot(range(1, len(curve) + 1), curve, style, color=color, alpha=1 if strong else 0.35, label=label)
    axes.set(xlabel="optimizer step", ylabel="training loss, nats a token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def name_of(way: str, seed: int) -> str:
    """Name of a curve in the result."""
    return f"{way}, adapter seed {seed}"


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = [
        f"{result['hardware']}, {result['date']}; {result['steps']} steps of 32 notes.",
        "",
        "| compared | largest gap of a step | mean gap | largest, smoothed | mean, smoothed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["gaps"]:
        shown = [f"{row[key]:.2%}" for key in ("largest_step", "mean_step", "largest_smoothed", "mean_smoothed")]
        lines.append(f"| {row['compared']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Fit four times; write the curves, their gaps and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flags", default="", help="more flags of medlit fit")
    options = parser.parse_args(arguments)

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch

    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed, packed in product(SEEDS, (True, False)):
            name = name_of("packed" if packed else "padded", seed)
            curves[name] = fit(Path(scratch) / name.replace(", ", "_"), options, packed=packed, seed=seed)
            print(name, "ends at", round(curves[name][-1], 4), file=sys.stderr, flush=True)
    first, second = SEEDS
    compared = {
        "packed beside padded, first seed": (("packed", first), ("padded", first)),
        "packed beside padded, second seed": (("packed", second), ("padded", second)),
        "padded, second seed beside first": (("padded", second), ("padded", first)),
        "packed, second seed beside first": (("packed", second), ("packed", first)),
    }
    result = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "unsloth")},
        "date": datetime.now(UTC).date().isoformat(),
        "steps": options.steps,
        "gaps": [
            {"compared": what, **gap(curves[name_of(*one)], curves[name_of(*other)])}
            for what, (one, other) in compared.items()
        ],
        "curves": curves,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(curves, options.output.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
