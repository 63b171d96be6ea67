"""Cross-validate the 135M model on a table of real notes beside TF-IDF, and compare settings.

    python benchmarks/folds.py --source notes.csv --folder runs/folds --variants variants.txt

Each variant is a name and flags of `medlit fit`, one a line of the file (`name: --model.optimizer.learning_rate 1e-3`)
or of `--variant`. For each fold of a k-fold split by text group, the model is fitted on the other folds (one of them
picks the best checkpoint), then answers the fold with the decoders; `--jobs` processes, each on one of the GPUs if any,
take one (variant, fold) after another. TF-IDF and the majority class are fitted on the same notes. The folds'
answers put together are one answer to each note: scores, intervals and comparisons are of those. A (variant, fold)
that has finished, as its `finished.json` says, is not run again; what else lies in its place is removed first.

Writes `benchmarks/results/folds.json`: scores only. The folder holds ids and labels, no text and no weights.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from medlit.evaluation.intervals import compare
from medlit.evaluation.results import Results
from medlit.report.systems import System

RESULTS = Path(__file__).parent / "results" / "folds.json"
CONFIGS = [Path(__file__).parents[1] / "configs" / name for name in ("llama31_8b.yaml", "models/smollm2_135m.yaml")]
DECODERS = ("generate", "constrained", "likelihood")
BASELINES = ("tfidf", "majority")
# Added to the small model's config; a variant's flags follow.
BASE = (
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.num_sanity_val_steps 0"
    " --early_stopping.patience 1000"
)


def hardware() -> str:
    """The device that this process fits on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def finished(options: argparse.Namespace, name: str, fold: int) -> Path:
    """The file that marks a variant's fold as done, with hardware and duration."""
    folder: Path = options.folder
    return folder / name / f"fold_{fold}" / "finished.json"


def fold_flags(options: argparse.Namespace, fold: int) -> list[str]:
    """The settings of the notes and of one fold."""
    flags = ["--data.source", options.source, "--data.split.kind", "kfold", "--data.split.folds", str(options.folds)]
    flags += ["--data.split.fold", str(fold), "--data.split.near_threshold", str(options.near_threshold)]
    return [*flags, *shlex.split(options.data)]


def fit_and_answer(options: argparse.Namespace, name: str, flags: str, fold: int) -> None:
    """One variant on one fold, in this process."""
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch

    from medlit.cli.cli import main as medlit

    place = finished(options, name, fold).parent
    work = place / "fit"
    shutil.rmtree(place, ignore_errors=True)
    configs = [f"--config={path}" for path in CONFIGS]
    settings = [*configs, *shlex.split(BASE), *fold_flags(options, fold), *shlex.split(flags)]
    began = time.monotonic()
    # Validations answer by likelihood: the temperature comes with the checkpoint, and they are the cheapest.
    medlit(["fit", "--model.decoding.mode", "likelihood", *settings, "--run_dir", str(work)])
    fitted = time.monotonic()
    for mode in options.decoders:
        gc.collect()  # or the model before stays beside the next one
        best = ["--ckpt_path", str(work / "checkpoints" / "best.ckpt"), "--run_dir", str(place / mode)]
        medlit(["test", *settings, *best, "--model.decoding.mode", mode])
    seconds = {"fit_seconds": fitted - began, "tests_seconds": time.monotonic() - fitted}
    shutil.copy(work / "fit_metrics.json", place / "fit_metrics.json")
    shutil.rmtree(work)
    gc.collect()
    left = torch.cuda.memory_allocated() / 2**30  # one task must leave nothing to the next
    outcome = {"hardware": hardware(), **seconds, "gib_left_allocated": left}
    finished(options, name, fold).write_text(json.dumps(outcome))


def work(options: argparse.Namespace) -> None:
    """Fit and answer tasks from standard input, one JSON line each; the first error ends the process.

    Importing and compiling take a process as long as a fit of the small model does. Whatever a task says is in its log.
    """
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        name, flags, fold = json.loads(line)
        with (options.folder / name / f"fold_{fold}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        fit_and_answer(options, name, flags, fold)
        sys.stdout.flush()
        print("done", file=replies, flush=True)


def hand_out(options: argparse.Namespace, tasks: queue.SimpleQueue[tuple[str, str, int]], place: int) -> None:
    """Keep one worker process busy until no task is left; a worker that failed is replaced.

    Args:
        options: of the command line.
        tasks: (variant, flags, fold).
        place: of this process among the `--jobs`, which take the GPUs in turn.
    """
    import torch

    command = [sys.executable, __file__, "--work", "--source", options.source, "--folder", str(options.folder)]
    command += ["--folds", str(options.folds), f"--data={options.data}", "--decoders", *options.decoders]
    command += ["--near_threshold", str(options.near_threshold)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs)), **os.environ}
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    pipe = subprocess.PIPE
    worker: subprocess.Popen[str] | None = None
    while not tasks.empty():
        try:
            name, flags, fold = tasks.get_nowait()
        except queue.Empty:
            break
        (options.folder / name).mkdir(parents=True, exist_ok=True)
        if worker is None:
            worker = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        began = time.monotonic()
        print(json.dumps([name, flags, fold]), file=worker.stdin, flush=True)
        outcome = "done" if worker.stdout and worker.stdout.readline() else f"exit code {worker.wait()}"
        print(f"{name}, fold {fold}: {outcome}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        worker = worker if outcome == "done" else None
    if worker is not None:
        worker.communicate()


def run_all(options: argparse.Namespace, variants: dict[str, str]) -> None:
    """Run the missing folds, variant by variant, on `options.jobs` processes."""
    tasks: queue.SimpleQueue[tuple[str, str, int]] = queue.SimpleQueue()
    for name, flags in variants.items():
        for fold in range(options.folds):
            if not finished(options, name, fold).is_file():
                tasks.put((name, flags, fold))
    with ThreadPoolExecutor(options.jobs) as pool:
        for job in [pool.submit(hand_out, options, tasks, place) for place in range(options.jobs)]:
            job.result()


def fit_baselines(options: argparse.Namespace) -> None:
    """TF-IDF and the majority class on every fold; reading the notes here fills the cache that the others use."""
    from medlit.tools.baseline import run as baseline

    for fold in range(options.folds):
        folder = options.folder / "baselines" / f"fold_{fold}"
        if not (folder / "report.md").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config_test.yaml").write_text("{}")
            baseline(["--run_dir", str(folder), *fold_flags(options, fold)])


def put_together(files: Sequence[Path]) -> tuple[Results, list[float]] | None:
    """The folds' answers as one result, and each fold's accuracy; None if a fold is missing."""
    if not all(file.is_file() for file in files):
        return None
    parts = [Results.read(file) for file in files]
    starts = np.cumsum([0, *map(len, parts)])
    joined = [replace(part, rows=part.rows + begin) for part, begin in zip(parts, starts, strict=False)]
    return Results.join(joined), [float(part.correct.mean()) for part in parts]


def row(variant: str, system: str, answered: Results, per_fold: list[float]) -> dict[str, Any]:
    """The numbers of one system."""
    metrics = System.score(system, answered).metrics
    counts = ("accuracy", "f1_macro", "invalid_rate", "n")
    others = ("accuracy_ci", "accuracy_ci_bootstrap", "f1_macro_ci", "top3_accuracy", "log_loss", "ece", "aurc")
    return {
        "variant": variant,
        "system": system,
        **{name: metrics[name] for name in (*counts, *others)},
        "accuracy_per_fold": per_fold,
    }


def collect(options: argparse.Namespace, variants: dict[str, str]) -> dict[str, Any]:
    """Score and compare what has been run."""
    folds = range(options.folds)
    found: dict[tuple[str, str], Results] = {}
    rows = []
    for variant, systems in (("baselines", BASELINES), *((name, DECODERS) for name in variants)):
        for system in systems:
            name = f"fold_{{}}/{system}/test" if variant in variants else f"fold_{{}}/baseline_{system}"
            files = [options.folder / variant / f"{name.format(fold)}_answers.parquet" for fold in folds]
            if (together := put_together(files)) is not None:
                found[variant, system] = together[0]
                rows.append(row(variant, system, *together))
    comparisons = []
    first = next(iter(variants), None)
    for (variant, system), answered in found.items():
        others = [("baselines", "tfidf"), (first, system)]
        for other in others:
            if variant != "baselines" and other in found and other != (variant, system):
                outcome = compare(answered, found[other])
                names = {"variant": variant, "system": system, "against": " ".join(map(str, other))}
                comparisons.append({**names, **asdict(outcome), "words": outcome.summary(" ".join(map(str, other)))})
    # The answers may come from other machines.
    left = [finished(options, name, fold) for name in variants for fold in folds]
    devices = {json.loads(file.read_text(encoding="utf-8"))["hardware"] for file in left if file.is_file()}
    return {
        "hardware": ", ".join(sorted(devices)) or hardware(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "folds": options.folds,
        "near_threshold": options.near_threshold,
        "base": BASE,
        "data": options.data,
        "configs": [path.name for path in CONFIGS],
        "variants": variants,
        "systems": rows,
        "comparisons": comparisons,
    }


def show(results: dict[str, Any]) -> None:
    """Print the table and the comparisons as Markdown."""
    print("| variant | system | accuracy | macro F1 | off the list | log-loss | ECE |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in results["systems"]:
        low, high = one["accuracy_ci_bootstrap"]
        least, most = one["f1_macro_ci"]
        log_loss, ece = ("" if one[name] is None else f"{one[name]:.3f}" for name in ("log_loss", "ece"))
        print(
            f"| {one['variant']} | {one['system']} | {one['accuracy']:.1%} ({low:.1%} to {high:.1%})"
            f" | {one['f1_macro']:.3f} ({least:.3f} to {most:.3f}) | {one['invalid_rate']:.1%} | {log_loss} | {ece} |"
        )
    print()
    for one in results["comparisons"]:
        print(f"- {one['variant']} {one['system']}. {one['words']}")


def read_variants(options: argparse.Namespace) -> dict[str, str]:
    """Name -> flags, in the order given; the first is what the others are compared with."""
    lines = list(options.variant)
    if options.variants is not None:
        lines += options.variants.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(":") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {name.strip(): flags.strip() for name, _, flags in pairs}


def main() -> None:
    """Run missing folds in parallel, then score everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="table of notes, as for data.source")
    parser.add_argument("--folder", type=Path, required=True, help="where answers and logs go; kept between runs")
    parser.add_argument("--variants", type=Path, help="file of lines 'name: flags'")
    parser.add_argument("--variant", action="append", default=[], help="'name: flags'; several")
    parser.add_argument("--data", default="", help="further flags for all, such as '--data.columns.text note'")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--near_threshold", type=float, default=0.8)
    parser.add_argument("--jobs", type=int, default=5, help="processes at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS, help="fewer are faster")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    variants = read_variants(options)
    fit_baselines(options)
    run_all(options, variants)
    results = collect(options, variants)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
