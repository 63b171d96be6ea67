"""Cross-validate the 135M model on a table of real notes beside other systems, and choose between settings.

    python benchmarks/folds.py --source 'notes_*.csv' --folder runs/folds --variants benchmarks/variants.txt --select
    python benchmarks/folds.py --source 'notes_*.csv' --folder runs/folds --system 'medlit_135m: a + b * tfidf'

Each variant is a name and flags of `medlit fit`, one a line of the file (`name: --model.optimizer.learning_rate 1e-3`)
or of `--variant`; a name that begins with that of a peer (`peers.py`) is a variant of the peer, with its own flags. For
each fold of a k-fold split by text group, near duplicates together, the model is fitted on the other folds, of which
the next one picks the best checkpoint; then both of these folds are answered by label likelihood. `--jobs` processes,
each on one of the GPUs if any, take one (variant, fold) after another, in the order of the file. One that has finished,
as its `finished.json` says, is not run again, so that a run that was stopped or reached its `--limit` continues.

`--select` scores the variants on the validation folds: what is chosen there does not see the test folds that
`--output` reports. A `--system` is a name and its recipe: variants whose probabilities are averaged (`a + b`), and
other systems by a power of whose probabilities these are multiplied (`* tfidf`); the powers, and by them the
temperature, are fitted on the validation folds (`folds_scores.py`). By default each peer is a system, and
`medlit_135m` the first variant.

The folder holds ids, labels and probabilities, no text and no weights.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folds_scores import Scored, Units
    from jsonargparse import Namespace

RESULTS = Path(__file__).parent / "results" / "folds_all.json"
CONFIGS = [Path(__file__).parents[1] / "configs" / name for name in ("llama31_8b.yaml", "models/smollm2_135m.yaml")]
PEERS = ("tfidf", "majority", "head", "unsloth_decision", "token_prior")
# Added to the small model's config; a variant's flags follow. The prior is a system beside it, so that both show alone.
BASE = (
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.num_sanity_val_steps 0"
    " --early_stopping.patience 1000 --model.decoding.mode likelihood --model.decoding.prior null"
)
_PACKAGES = ("torch", "unsloth", "transformers", "peft", "lightning", "scikit-learn")
Task = tuple[str, str, int]  # name of the variant, flags, fold


def hardware() -> str:
    """The device that this process fits on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Of Python and the packages that the scores depend on; a machine may have one under another name."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def place_of(options: argparse.Namespace, name: str, fold: int) -> Path:
    """The folder of a variant's fold; its `finished.json` marks it as done, with hardware and duration."""
    folder: Path = options.folder
    return folder / name / f"fold_{fold}"


def chosen_folds(options: argparse.Namespace) -> list[int]:
    """The folds that are run and scored."""
    return options.only_folds or list(range(options.folds))


def peer_of(name: str) -> str | None:
    """The peer that a variant's name begins with."""
    return next((peer for peer in PEERS if name.startswith(peer)), None)


def settings_of(options: argparse.Namespace, fold: int) -> list[str]:
    """The configs, and the settings of the notes and of one fold."""
    flags = [f"--config={path}" for path in CONFIGS] + shlex.split(BASE)
    flags += ["--data.source", options.source, "--data.split.kind", "kfold", "--data.split.folds", str(options.folds)]
    flags += ["--data.split.fold", str(fold), "--data.split.near_threshold", str(options.near_threshold)]
    return [*flags, *shlex.split(options.data)]


def answer_by_medlit(options: argparse.Namespace, flags: list[str], fold: int, place: Path) -> None:
    """Fit the model on a fold, and answer its validation and test notes with the best checkpoint."""
    from medlit.cli.cli import main as medlit
    from medlit.evaluation.calibration import at_temperature
    from medlit.evaluation.results import Results
    from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata

    work = place / "fit"
    settings = [*settings_of(options, fold), *flags, "--run_dir", str(work)]
    medlit(["fit", *settings])
    for verb in ("validate", "test"):
        gc.collect()  # or the model before stays beside the next one
        medlit([verb, *settings, "--ckpt_path", str(work / "checkpoints" / "best.ckpt")])
    shutil.copy(work / "test_answers.parquet", place / "test_answers.parquet")
    validated = Results.read(work / "validate_answers.parquet")
    if validated.probabilities is not None:  # a test's are at the temperature that the validation fitted
        (temperature,) = AdapterMetadata.read(work / "adapter" / METADATA_FILE).temperatures.values()
        validated = replace(validated, probabilities=at_temperature(validated.probabilities, temperature))
    validated.write(place / "validation_answers.parquet")
    shutil.copy(work / "fit_metrics.json", place / "fit_metrics.json")
    shutil.rmtree(work)


def answer_by_peer(options: argparse.Namespace, peer: str, flags: list[str], fold: int, place: Path) -> None:
    """Fit a peer on a fold and answer its validation and test notes."""
    import numpy as np
    from peers import PEERS as FUNCTIONS

    from medlit.evaluation.results import Results
    from medlit.tools.baseline import BaselineData

    own, of_medlit = (flags, []) if peer == "unsloth_decision" else ([], flags)
    config, data = read_data(settings_of(options, fold) + of_medlit)
    notes = BaselineData.read(data, None)
    for split, probabilities in FUNCTIONS[peer](notes, data, config, own).items():
        rows = notes.validation if split == "validation" else notes.test
        assert rows is not None
        zeros = np.zeros(len(rows), dtype=np.int64)
        labels, answer = notes.label_ids(rows), probabilities.argmax(axis=1)
        texts = rows["id"][:], rows["text_hash"][:]
        own = labels[:, None].tolist()
        Results(notes.label_set.names, zeros, *texts, labels, answer, probabilities, zeros, zeros, own).write(
            place / f"{split}_answers.parquet"
        )


def read_data(flags: list[str]) -> tuple[Namespace, Any]:
    """The settings, and the notes' datamodule."""
    from medlit.cli.arguments import make_datamodule, parse_settings

    config = parse_settings("baseline", flags)
    return config, make_datamodule(config)


def run_one(options: argparse.Namespace, name: str, flags: str, fold: int) -> None:
    """One variant on one fold, in this process."""
    place = place_of(options, name, fold)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    began = time.monotonic()
    if peer := peer_of(name):
        answer_by_peer(options, peer, shlex.split(flags), fold, place)
    else:
        answer_by_medlit(options, shlex.split(flags), fold, place)
    gc.collect()  # or the model before stays beside the next one
    seconds = time.monotonic() - began
    outcome = {"hardware": hardware(), "seconds": seconds, "flags": flags, "versions": versions()}
    (place / "finished.json").write_text(json.dumps(outcome))


def work(options: argparse.Namespace) -> None:
    """Run tasks from standard input, one JSON line each; the first error ends the process.

    Importing and compiling take a process as long as a fit of the small model does. Whatever a task says is in its log.
    """
    replies = os.fdopen(os.dup(1), "w")
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    for line in sys.stdin:
        name, flags, fold = json.loads(line)
        with (options.folder / name / f"fold_{fold}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run_one(options, name, flags, fold)
        sys.stdout.flush()
        print("done", file=replies, flush=True)


def hand_out(
    options: argparse.Namespace, tasks: queue.SimpleQueue[Task], place: int, slowest: dict[str, float]
) -> None:
    """Keep one worker process busy until no task is left or the time is up; a worker that failed is replaced.

    Args:
        options: of the command line.
        tasks: left to run.
        place: of this process among the `--jobs`, which take the GPUs in turn.
        slowest: variant -> the longest that a fold of it took, in seconds.
    """
    import torch

    command = [sys.executable, __file__, "--work", "--source", options.source, "--folder", str(options.folder)]
    command += ["--folds", str(options.folds), f"--data={options.data}"]
    command += ["--near_threshold", str(options.near_threshold)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs)), **os.environ}
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    # Processes that write it at the same time read each other's half-written modules.
    environment["UNSLOTH_COMPILE_LOCATION"] = str(Path(options.compiled or options.folder / "compiled") / str(place))
    pipe = subprocess.PIPE
    worker: subprocess.Popen[str] | None = None
    of_worker: str | None = None  # Unsloth's patches for one kind of model stay in the process
    while not tasks.empty():
        try:
            name, flags, fold = tasks.get_nowait()
        except queue.Empty:
            break
        now = time.monotonic()
        if now + slowest.get(name, 0) > options.ends:
            print(f"{name}, fold {fold}: no time left", file=sys.stderr, flush=True)
            continue  # a shorter one may fit
        (options.folder / name).mkdir(parents=True, exist_ok=True)
        if worker is not None and of_worker != peer_of(name):
            worker.communicate()
            worker = None
        of_worker = peer_of(name)
        if worker is None:
            worker = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        print(json.dumps([name, flags, fold]), file=worker.stdin, flush=True)
        outcome = "done" if worker.stdout and worker.stdout.readline() else f"exit code {worker.wait()}"
        seconds = time.monotonic() - now
        print(f"{name}, fold {fold}: {outcome}, {seconds:.0f} s", file=sys.stderr, flush=True)
        slowest[name] = max(seconds, slowest.get(name, 0)) if outcome == "done" else slowest.get(name, 0)
        worker = worker if outcome == "done" else None
    if worker is not None:
        worker.communicate()


def run_all(options: argparse.Namespace, variants: dict[str, str]) -> None:
    """Run the missing folds, variant by variant, on `options.jobs` processes."""
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for name, flags in variants.items():
        for fold in chosen_folds(options):
            if not (place_of(options, name, fold) / "finished.json").is_file():
                tasks.put((name, flags, fold))
    slowest: dict[str, float] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for job in [pool.submit(hand_out, options, tasks, place, slowest) for place in range(options.jobs)]:
            job.result()


def read_units(options: argparse.Namespace) -> Units:
    """What is scored: every row with its own label, whatever the systems were trained on."""
    from folds_scores import Units

    _, data = read_data([*settings_of(options, 0), "--data.label_conflicts", "keep"])
    return Units.read(data, options.near_threshold, options.score == "rows")


def select(options: argparse.Namespace, variants: dict[str, str], units: Units) -> None:
    """Print the scores of variants on their validation folds, and their differences from the first."""
    from folds_scores import difference, score

    recipes = {name: name for name in variants} | options.recipes
    folds = chosen_folds(options)
    found = [score(name, recipe, options.folder, units, folds, "validation") for name, recipe in recipes.items()]
    scored = [each for each in found if each is not None]
    rows = [each.row() for each in scored]
    against = [None, *(difference(each, scored[0]) for each in scored[1:])]
    print(markdown(rows, against))
    (options.folder / "select.json").write_text(json.dumps({"systems": rows, "differences": against[1:]}, indent=1))


def markdown(rows: list[dict[str, Any]], against: list[dict[str, Any] | None]) -> str:
    """A table of scores, with the difference from another system."""
    lines = ["| system | n | any-of | strict | macro F1 | log-loss | ECE | 0.90 | 0.95 | any-of, points |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row, other in zip(rows, against, strict=True):
        sets = " | ".join(f"{reached:.1%}, {size:.2f}" for reached, size in row["coverage"].values())
        points = "" if other is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*other["any_of"])
        extra = f", sets {row['set_f1_micro']:.3f}" if "set_f1_micro" in row else ""
        lines.append(
            f"| {row['system']} | {row['n']} | {row['any_of']:.1%} | {row['strict']:.1%} | {row['f1_macro']:.3f}{extra}"
            f" | {row['log_loss']:.3f} | {row['ece']:.3f} | {sets} | {points} |"
        )
    return "\n".join(lines)


def collect(options: argparse.Namespace, variants: dict[str, str], units: Units) -> dict[str, Any]:
    """Score the systems that have answered every fold, and compare the first with the others."""
    from folds_scores import score

    own = next((name for name in variants if peer_of(name) is None), None)
    recipes = ({} if own is None else {"medlit_135m": own}) | {peer: peer for peer in PEERS} | options.recipes
    scored: dict[str, Scored] = {}
    for name, recipe in recipes.items():
        found = score(name, recipe, options.folder, units, chosen_folds(options))
        if found is not None and len(found.folds) == len(chosen_folds(options)):
            scored[name] = found
    return report(options, variants, units, scored) | {"recipes": {name: recipes[name] for name in scored}}


def report(
    options: argparse.Namespace, variants: dict[str, str], units: Units, scored: dict[str, Scored]
) -> dict[str, Any]:
    """The content of the results file."""
    from folds_scores import difference

    systems = list(scored.values())
    done = [json.loads(path.read_text()) for path in options.folder.glob("*/fold_*/finished.json")]
    return {
        "notes": len(units.text_hashes),
        "texts": len(set(units.text_hashes)),
        "folds": options.folds,
        **({} if options.only_folds is None else {"only_folds": options.only_folds}),
        "near_threshold": options.near_threshold,
        "scored": options.score,
        "hardware": ", ".join(sorted({outcome["hardware"] for outcome in done})),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "versions": _joined([outcome.get("versions", {}) for outcome in done]),
        "configs": [path.name for path in CONFIGS],
        "base": BASE,
        "data": options.data,
        "variants": variants,
        "systems": [each.row() for each in systems],
        "differences": [difference(systems[0], other) for other in systems[1:]],
    }


def _joined(versions: list[dict[str, str]]) -> dict[str, str]:
    """The versions on all machines that answered."""
    names = {name for each in versions for name in each}
    return {name: ", ".join(sorted({each[name] for each in versions if name in each})) for name in sorted(names)}


def read_named(lines: list[str], file: Path | None) -> dict[str, str]:
    """Name -> what follows its colon, in the order given; '#' begins a comment."""
    lines = [*lines, *([] if file is None else file.read_text(encoding="utf-8").splitlines())]
    pairs = [line.partition(":")[::2] for line in lines if line.strip() and not line.startswith("#")]
    return {name.strip(): rest.strip() for name, rest in pairs}


def main() -> None:
    """Run missing folds in parallel, then score everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="tables of notes, as for data.source: a file or a glob")
    parser.add_argument("--folder", type=Path, required=True, help="where answers and logs go; kept between runs")
    parser.add_argument("--variants", type=Path, help="file of lines 'name: flags'")
    parser.add_argument("--variant", action="append", default=[], help="'name: flags'; several")
    parser.add_argument("--system", action="append", default=[], help="'name: a + b * c'; several")
    parser.add_argument("--only", nargs="+", help="names of the variants to run; others are scored if they have run")
    parser.add_argument("--data", default="", help="further flags for all, such as '--data.columns.text note'")
    parser.add_argument("--score", choices=["rows", "texts"], default="rows", help="texts: with all their labels")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only_folds", type=int, nargs="+", help="run and score these alone")
    parser.add_argument("--near_threshold", type=float, default=0.8)
    parser.add_argument("--jobs", type=int, default=5, help="processes at a time")
    parser.add_argument("--compiled", type=Path, help="where Unsloth writes modules; by default in the folder")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no fold is begun")
    parser.add_argument("--select", action="store_true", help="score variants on their validation folds")
    parser.add_argument("--run_only", action="store_true", help="score nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ends = time.monotonic() + options.limit
    if options.work:
        work(options)
        return
    variants, options.recipes = read_named(options.variant, options.variants), read_named(options.system, None)
    chosen = variants if options.only is None else {name: variants[name] for name in options.only}
    run_all(options, chosen)
    if options.run_only:
        return
    units = read_units(options)
    if options.select:
        select(options, variants, units)
        return
    results = collect(options, variants, units)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results["systems"], [None, *results["differences"]]))


if __name__ == "__main__":
    main()
