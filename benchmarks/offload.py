"""Train models larger than the GPU memory they may use: layers that do not fit stay in host memory.

    LLAMA_TOKENIZER=folder python benchmarks/offload.py --folder DIR --models 8B:6 8B:8 70B:24    DIR with 45 GB free
    python benchmarks/offload.py --folder DIR --models 70B:16:40 --how offload ddp balanced fsdp2   on two GPUs
    python benchmarks/offload.py --folder DIR --models 8B:70:8 --how none offload --steps 23   where everything fits
    python benchmarks/offload.py --table benchmarks/results/offload.json   the result for README.md
    python benchmarks/offload.py --tiny --folder DIR --output FILE.json    a two-layer model on the CPU, a minute

A model is `size:budget` or `size:budget:layers`, in GiB of GPU memory and decoder layers (all by default). A Llama of
that width is written with random weights, in 4 bits, and `medlit fit` with `configs/hardware/offload_24gb.yaml` trains
it for three steps of 32 notes as long as real ones within the budget, which is also a limit of the allocator, then
validates a batch of at most 13 invented notes by likelihood; with `--resume` the fit continues from its checkpoint for
one more step.

`--how` names the ways to train it: `offload` on one GPU; `none` the same with offloading off; `ddp` on two, by
`configs/hardware/ddp.yaml`; `balanced` and `fsdp2` split the model over two GPUs and have micro-batches of as many
tokens (`offload_peers.py`). Rows are added to the result; one of the same model, budget, layers and way is replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

from clocked_fit import add_row, fit, parser, say  # noqa: E402
from offload_peers import SYSTEMS as PEERS  # noqa: E402

GIB = 2**30
NOTES, GPUS = 32, 2
KEY = ("model", "budget_gib", "layers", "how")
FITS = ("offload", "none", "ddp")


def main(argv: list[str] | None = None) -> None:
    """Measure, or show a result."""
    arguments = parser(__doc__, HERE / "results" / "offload.json")
    arguments.add_argument("--models", nargs="+", default=["8B:6", "8B:8", "70B:24"], metavar="SIZE:GIB[:LAYERS]")
    arguments.add_argument("--how", nargs="+", choices=(*FITS, *PEERS), default=["offload"])
    arguments.add_argument("--steps", type=int, default=3, help="timed from the second on, of many from the fourth on")
    arguments.add_argument("--weights", type=Path, help="of one model: kept here, or taken from here if they are there")
    arguments.add_argument("--resume", action="store_true", help="continue from the checkpoint for another step")
    options = arguments.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for model in ["8B:6:2"] if options.tiny else options.models:
        size, budget, *layers = model.split(":")
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            measure(Path(scratch), size, float(budget), int(layers[0]) if layers else None, options)
    if not options.output.exists():
        raise SystemExit("nothing was measured")
    print(table(json.loads(options.output.read_text())))


def measure(scratch: Path, size: str, budget: float, layers: int | None, options: argparse.Namespace) -> None:
    """Write a model and train it in each way; one that fails leaves the others their turn."""
    from shapes import LLAMAS, write_notes

    from medlit.base_model import load_tokenizer

    weights, shrink = options.weights or scratch / "llama", 8 if options.tiny else 1
    if not weights.exists():
        # In a separate process, so that its GPU memory is free again afterwards.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            other.submit(write, weights, size, layers, options.tiny).result()
    say(f"{size}: {sum(path.stat().st_size for path in weights.iterdir()) / 1e9:.1f} GB of weights written")
    notes = write_notes(scratch / "notes", load_tokenizer(str(weights)), options.steps * NOTES, 66 // shrink, shrink)
    for how in options.how:
        folder = scratch / how
        folder.mkdir(exist_ok=True)
        say(f"{size} within {budget:g} GiB: {how}")
        try:
            if how in PEERS:
                found = train_peer(folder, weights, budget, how, options.tiny)
            else:
                found = train(folder, weights, notes, budget, how, options)
            seconds, tokens = found.pop("seconds"), found.pop("tokens")
            warm = 3 if options.steps > 6 else 1
            row = {"model": size, "layers": layers or LLAMAS[size][2], "budget_gib": budget, "how": how} | found
            row["tokens_per_second"] = round(sum(tokens[warm:]) / sum(seconds[warm:]))
            row["resumed"] = False
            add_row(options.output, row, KEY, tiny=options.tiny)
            say(json.dumps(row | {"seconds": seconds}))
            if options.resume and how in FITS:
                train(folder, weights, notes, budget, how, options, more=1)
                add_row(options.output, row | {"resumed": True}, KEY, tiny=options.tiny)
                say("resumed for another step")
        except subprocess.CalledProcessError as error:
            say(f"{how} failed: {error}")


def train(
    folder: Path, weights: Path, notes: Path, budget: float, how: str, options: argparse.Namespace, more: int = 0
) -> dict[str, Any]:
    """Train by `medlit fit`, on one GPU or in as many processes as GPUs; memory is that of the fullest GPU.

    With `more` it continues from the checkpoint of the fit before for as many steps.
    """
    gpus = GPUS if how == "ddp" else 1
    trainer: dict[str, Any] = {"max_steps": options.steps + more, "logger": False, "devices": gpus}
    files = ["hardware/offload_24gb.yaml", *(["hardware/ddp.yaml"] if how == "ddp" else [])]
    values: dict[str, Any] = {"model": {"decoding": {"mode": "likelihood"}}} | ({"ckpt_path": "last"} if more else {})
    values["model"]["language_model"] = {"memory_budget_gib": budget} | ({"offload": "none"} if how == "none" else {})
    files.append(settings(folder / f"{'resume' if more else 'budget'}.json", values))
    ranks = fit(folder, files, weights, notes, trainer, limit_gib=budget, tiny=options.tiny)
    if not more:
        steps = [list(chain(*parts)) for parts in zip(*(rank["micro_batches"] for rank in ranks), strict=True)]
        batches(weights).write_text(json.dumps(steps), encoding="utf-8")

    def most(name: str) -> float:
        return round(max(rank.get(name, 0) for rank in ranks) / GIB, 2)

    return {
        "gpus": gpus,
        "seconds": [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)],
        "tokens": [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)],
        "peak_gib": most("peak_bytes"),
        "estimated_gib": most("estimated_bytes"),
        "host_gib": round(sum(rank.get("host_bytes", 0) for rank in ranks) / GIB, 2),
        "offloaded_layers": ranks[0].get("offloaded_layers", 0),
        "layers_kept": ranks[0]["layers_kept"],
        "largest_micro_batch": max(rank["largest"] for rank in ranks),
    }


def train_peer(folder: Path, weights: Path, budget: float, how: str, tiny: bool) -> dict[str, Any]:
    """Train on the micro-batches of the fit before it, in one process or, with FSDP2, as many as GPUs."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={GPUS}"] if how == "fsdp2" else []
    script = [str(HERE / "offload_peers.py"), how, str(weights), str(batches(weights))]
    command = [sys.executable, *start, *script, str(folder / "found.json"), "--gib", str(budget)]
    extra = {"UNSLOTH_FSDP2": "native"} if how == "fsdp2" and not tiny else {}  # on a CPU that needs Triton
    subprocess.run(command, check=True, env=os.environ | extra, stdout=sys.stderr)
    found = json.loads((folder / "found.json").read_text())
    found |= {"peak_gib": max(found["peak_gib"], default=0), "loading_gib": max(found["loading_gib"], default=0)}
    return found | {"host_gib": 0, "offloaded_layers": 0, "layers_kept": [0, 0]}


def batches(weights: Path) -> Path:
    """The tokens of the micro-batches that the last fit trained on, which a peer takes."""
    return weights.with_name(f"{weights.name}_batches.json")


def settings(path: Path, values: dict[str, Any]) -> str:
    """A config file."""
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def write(weights: Path, size: str, layers: int | None, tiny: bool) -> None:
    """The weights and their tokenizer."""
    from large import write as write_tiny
    from shapes import llama_config, llama_tokenizer, write_llama_4bit

    if tiny:
        write_tiny(weights, tiny)
        return
    config = llama_config(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    weights.mkdir()
    llama_tokenizer().save_pretrained(weights)
    write_llama_4bit(weights, config, "cuda")


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        "| Llama 3.1 | layers | budget, GiB | how | GPUs | in host memory | kept | tokens/s | peak, GiB | estimated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        kept = "all" if row["layers_kept"] is None else " to ".join(map(str, sorted(set(row["layers_kept"]))))
        host = f"{row['offloaded_layers']} layers, {row['host_gib']} GiB" if row["offloaded_layers"] else "none"
        cells = (row["model"], row["layers"], f"{row['budget_gib']:g}", row["how"], row["gpus"], host, kept)
        cells += (f"{row['tokens_per_second']:,}", row["peak_gib"], row.get("estimated_gib", ""))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
