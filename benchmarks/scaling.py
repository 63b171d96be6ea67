"""The same YAML on one GPU and on several: speed, memory, and agreement of the losses.

    LLAMA_TOKENIZER=folder python benchmarks/scaling.py --gpus 1 2          one host, some ten minutes
    python benchmarks/scaling.py --kinds weak --curve 13 --output FILE.json  weak scaling alone, six
    python benchmarks/scaling.py --table benchmarks/results/scaling.json    the result for README.md
    python benchmarks/scaling.py --tiny --output FILE.json                  two processes on a CPU, two minutes

Every row is `medlit fit --config configs/llama31_8b.yaml --config configs/hardware/ddp.yaml` on an 8B Llama with random
weights (`shapes.py`) and notes as long as real ones: started and launched as a user's would be, with a clock beside it
(`fit_clock.py`), which waits for the GPU once a step. Strong scaling shares the same 32 notes a step among more GPUs,
weak scaling gives each GPU 32. The fits of strong scaling take 30 steps, every one of them on the same notes: their
loss curves and the first step's gradients are compared, and drawn beside the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

from clocked_fit import describe, fit, say  # noqa: E402
from curve import losses  # noqa: E402
from train_parity import Gradient  # noqa: E402

GIB = 2**30
NOTES = 32  # a step, or a GPU's share of one
WARM_UP, PROFILED = 3, 2


def main(argv: list[str] | None = None) -> None:
    """Measure, or show a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    parser.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, the first one being 1")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of weak scaling, after 3 of warm-up")
    parser.add_argument("--curve", type=int, default=30, help="steps of strong scaling")
    parser.add_argument("--kinds", nargs="+", choices=("strong", "weak"), default=("strong", "weak"))
    parser.add_argument("--weights", type=Path, help="the 8B's, if already written (python shapes.py FOLDER)")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU, one process for each 'GPU'")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    print(table(result))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure all rows; the file is written after each."""
    weights = options.weights or scratch / "llama"
    if options.tiny:
        from fakes import write_llama

        write_llama(weights)
    elif options.weights is None:
        weights.mkdir()
        subprocess.run([sys.executable, str(HERE / "shapes.py"), str(weights)], check=True)
    say("weights written")
    from shapes import write_notes

    from medlit.base_model import load_tokenizer

    most = max(options.gpus)
    count = NOTES * max(options.curve + PROFILED, most * (WARM_UP + options.steps + PROFILED))
    shrink = 8 if options.tiny else 1
    # The prompt and an answer around the text: 66 tokens of Llama 3.1's.
    notes = write_notes(scratch / "notes", load_tokenizer(str(weights)), count, 66 // shrink, shrink)
    import torch

    hardware = "CPU" if options.tiny else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    result = describe(hardware) | {"systems": []}
    # Both kinds are compared with one GPU and 32 notes a step.
    rows = [("strong", n) for n in options.gpus if n == 1 or "strong" in options.kinds]
    rows += [("weak", n) for n in options.gpus if n > 1 and "weak" in options.kinds]
    for kind, gpus in rows:
        steps = options.curve if kind == "strong" else WARM_UP + options.steps
        notes_a_step = NOTES * (gpus if kind == "weak" else 1)
        folder = scratch / f"{kind}_{gpus}"
        folder.mkdir()
        trainer = {"devices": gpus, "max_steps": steps + PROFILED, "logger": True}
        more = {"global_batch_size": notes_a_step, "profiled": PROFILED, "gradient": True, "tiny": options.tiny}
        ranks = fit(folder, ["hardware/ddp.yaml"], weights, notes, trainer, **more)
        result["systems"].append(row(kind, notes_a_step, steps, ranks))
        say(json.dumps(result["systems"][-1]))
        if kind == "strong":
            result.setdefault("curves", {})[str(gpus)] = losses(folder / "run")[:steps]
            if gpus > 1:
                result.setdefault("same", []).append(compare(result["curves"], gpus, scratch))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result["curves"], options.output.with_suffix(".png"))
    return result


def row(kind: str, notes_a_step: int, steps: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine what the processes of a fit measured."""
    gpus = len(ranks)
    timed = range(WARM_UP, steps)
    tokens = np.array([rank["tokens"] for rank in ranks])  # (ranks, steps)
    seconds = np.max([rank["seconds"] for rank in ranks], axis=0)
    rates = [tokens[:, step].sum() / seconds[step] for step in timed]
    found: dict[str, Any] = {
        "system": f"{kind}_{gpus}",
        "gpus": gpus,
        "notes_a_step": notes_a_step,
        "notes_per_second": round(statistics.median(notes_a_step / seconds[step] for step in timed), 3),
        "tokens_per_second": round(statistics.median(rates)),
        "spread": [round(min(rates)), round(max(rates))],
        "steps": len(rates),
        # How much more work the slowest process has than the mean one.
        "imbalance": round(float(np.mean(1 - tokens.mean(0) / tokens.max(0))), 4),
        # Both include waiting: the rank with the most tokens changes, so any rank may wait in these steps.
        "all_reduce": round(min(rank["all_reduce_share"] for rank in ranks), 4),
        "exchange_and_waiting": round(max(rank["exchange_share"] for rank in ranks), 4),
        "weights_on": [rank["weights_on"] for rank in ranks],
        "layers_kept": [rank["layers_kept"] for rank in ranks],
        "first_step_seconds": round(float(seconds[0]), 1),
    }
    if "peak_bytes" in ranks[0]:
        found["peak_gib"] = [round(rank["peak_bytes"] / GIB, 2) for rank in ranks]
        found["estimated_gib"] = [round(rank["estimated_bytes"] / GIB, 2) for rank in ranks]
    return found


def compare(curves: dict[str, list[float]], gpus: int, scratch: Path) -> dict[str, Any]:
    """Relative differences of losses and first gradient between several GPUs and one."""
    import torch
    from fit_clock import GRADIENT

    one, several = (
        Gradient(curves[str(n)][0], torch.load(scratch / f"strong_{n}" / GRADIENT, weights_only=True, mmap=True))
        for n in (1, gpus)
    )
    apart = np.abs(np.array(curves[str(gpus)]) / np.array(curves["1"]) - 1)
    return {
        "gpus": gpus,
        "gradient": several.far(one),
        "loss_first": float(apart[0]),
        "loss_mean": float(apart.mean()),
        "loss_largest": float(apart.max()),
    }


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Plot the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for place, (gpus, curve) in enumerate(curves.items()):
        label = f"{gpus} GPU{'s' if gpus != '1' else ''}"
        axes.plot(range(1, len(curve) + 1), curve, "-" if not place else "--", label=label, linewidth=2 - 0.5 * place)
    axes.set(xlabel="optimizer step of 32 notes", ylabel="training loss, nats a token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    systems = {row["system"]: row for row in result["systems"]}
    alone = systems["strong_1"]["tokens_per_second"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        "| GPUs | notes a step | notes/s | tokens/s (slowest to fastest step) | x one GPU | efficiency | imbalance |"
        " all-reduce (all exchange), waiting included | peak GiB of each (estimated) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in result["systems"]:
        low, high = found["spread"]
        faster = found["tokens_per_second"] / alone
        several = found["gpus"] > 1
        reduced = f"{found['all_reduce']:.1%} ({found['exchange_and_waiting']:.1%})" if several else ""
        peaks = [f"{p} ({e})" for p, e in zip(found.get("peak_gib", []), found.get("estimated_gib", []), strict=True)]
        lines.append(
            f"| {found['gpus']} | {found['notes_a_step']} | {found['notes_per_second']} |"
            f" {found['tokens_per_second']:,} ({low:,} to {high:,}) | {faster:.2f} | {faster / found['gpus']:.1%} |"
            f" {format(found['imbalance'], '.1%') if several else ''} | {reduced} | {', '.join(peaks)} |"
        )
    if "same" in result:
        lines += ["", "| GPUs beside one | first gradient | first loss | loss, mean of all steps | largest |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {same['gpus']} | {same['gradient']:.2%} | {same['loss_first']:.3%} | {same['loss_mean']:.3%} |"
            f" {same['loss_largest']:.3%} |"
            for same in result["same"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
