"""What do 13, 40, 500 and 5,000 labels cost, from the metrics to a fit?

    python benchmarks/labels.py [--labels 13 500] [--stages "likelihood" "report"]    on a CPU, 15 minutes

Each stage runs in a separate process, on made-up results or with the two-layer Llama of the tests. Seconds are those
of the stage alone, without imports and the making of its input; the peak is how far the process's resident memory rose
above what it held before. `fit, validate, test` are commands, and theirs are of the whole process.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

LABELS = (13, 40, 500, 5000)
NOTES = 2000  # evaluated
ANSWERED = 8  # by each decoder
Measured = dict[str, float]
WORDS = (
    "acute",
    "chronic",
    "primary",
    "diffuse",
    "left",
    "right",
    "benign",
    "severe",
    "focal",
    "renal",
    "dural",
    "optic",
)


def label_names(k: int) -> list[str]:
    """K names of three to five words that share their beginnings."""
    return [f"{WORDS[i % 12]} {WORDS[i // 12 % 12]} {WORDS[i // 144 % 12]} disorder {i // 1728}" for i in range(k)]


def made_up(k: int, signal: float, notes: int) -> Any:  # noqa: ANN401 - Results
    """Results with probabilities."""
    from dataclasses import replace

    from made_results import random_results

    return replace(random_results(notes, k, signal=signal), names=tuple(label_names(k)))


@contextmanager
def clock() -> Iterator[Measured]:
    """Seconds and peak MiB of a block."""
    found: Measured = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, begin = _mib("VmRSS"), time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - begin
    found["peak_mib"] = _mib("VmHWM") - before


def _mib(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def metrics(k: int, folder: Path, notes: int) -> Measured:
    """Count the answers in batches of 32, and compute the scores."""
    import torch

    from medlit.data.labels import LabelSet
    from medlit.model.metrics import SpecialtyMetrics

    results = made_up(k, 4, notes)
    with clock() as found:
        counts = SpecialtyMetrics(LabelSet(results.names))
        for start in range(0, notes, 32):
            part = slice(start, start + 32)
            counts.update(torch.from_numpy(results.answer[part]), torch.from_numpy(results.truth[part]))
        counts.scores()
    return found


def intervals(k: int, folder: Path, notes: int) -> Measured:
    """Bootstrap, calibration and the other scores note by note."""
    from medlit.evaluation.metrics import uncertainty

    results = made_up(k, 4, notes)
    with clock() as found:
        uncertainty(results)
    return found


def temperature(k: int, folder: Path, notes: int) -> Measured:
    """Fit the temperature."""
    from medlit.evaluation.calibration import fit_temperature

    results = made_up(k, 4, notes)
    with clock() as found:
        fit_temperature(results.probabilities, results.truth)  # type: ignore[arg-type]
    return found


def answers_file(k: int, folder: Path, notes: int) -> Measured:
    """Write the answers, and read them."""
    from medlit.evaluation.results import Results

    results = made_up(k, 4, notes)
    with clock() as found:
        results.write(folder / "test_answers.parquet")
        Results.read(folder / "test_answers.parquet")
    return found


def confusion(k: int, folder: Path, notes: int) -> Measured:
    """Draw and save the confusion matrix."""
    from medlit.report.figures import confusion_figure

    results = made_up(k, 4, notes)
    confusion_figure(made_up(3, 4, 9), "imports").savefig(folder / "first.png")
    with clock() as found:
        confusion_figure(results, "made up").savefig(folder / "confusion.png", dpi=110)
    return found


def report(k: int, folder: Path, notes: int) -> Measured:
    """Write the report of two systems."""
    from medlit.report.page import write_report
    from medlit.report.systems import System, write_system

    for name, signal in (("test", 5), ("tfidf", 3)):
        write_system(folder, System.score(name, made_up(k, signal, notes), loss=0.5))
    with clock() as found:
        write_report(folder)
    return found


def audit(k: int, folder: Path, notes: int) -> Measured:
    """Audit a table of five notes a label, at least 2,000, and draw its figure."""
    from medlit.data.audit import audit as audit_notes
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.tools.audit import audit_figure

    first = write_table(folder / "first.csv", 2, 9)
    audit_figure(audit_notes(TranscriptionDataModule(str(first))))  # imports
    path = write_table(folder / "notes.csv", k, max(notes, 5 * k))
    with clock() as found:
        audit_figure(audit_notes(TranscriptionDataModule(str(path)))).savefig(folder / "audit.png", dpi=110)
    return found


def decoder(mode: str) -> Callable[[int, Path, int], Measured]:
    """Build a decoder and answer eight notes of about 400 tokens."""

    def measure(k: int, folder: Path, notes: int) -> Measured:
        import_llama(folder)
        import torch

        from medlit.base_model import load_tokenizer
        from medlit.data.collate import Collator, unnamed_rows
        from medlit.data.labels import LabelSet
        from medlit.data.prompt import AlpacaPrompt
        from medlit.model.decoding import make_decoder
        from medlit.model.language_model import inference_mode
        from medlit.model.loading import load_model
        from medlit.model.settings import Decoding, LanguageModel, Lora

        base = str(folder / "llama")
        model = load_model(LanguageModel(base, max_length=512), Lora(), torch.device("cpu"))
        inference_mode(model)
        prompt = AlpacaPrompt(load_tokenizer(base), max_length=512, max_response_tokens=48)
        texts = ["heart pain since Monday, " * 40] * ANSWERED
        batch = Collator(lambda name: [], int(prompt.tokenizer.pad_token_id)).prompts(  # type: ignore[arg-type]
            unnamed_rows(prompt.prompts(texts))
        )
        with clock() as found:
            make_decoder(Decoding(mode), model, prompt, LabelSet.from_names(label_names(k)))(batch)  # type: ignore[arg-type]
        return found

    return measure


def import_llama(folder: Path) -> None:
    """Write the tests' Llama."""
    from fakes import write_llama

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    write_llama(folder / "llama")


def write_table(path: Path, k: int, rows: int) -> Path:
    """Write notes that deal out the labels in turn."""
    names, draw = label_names(k), random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=6)) for _ in range(2000)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "transcription", "medical_specialty"])
        for row in range(rows):
            text = " ".join(draw.choices(vocabulary, k=20))
            writer.writerow([f"{path.stem}-{row}", text, names[row % k]])
    return path


def commands(k: int, folder: Path, notes: int) -> Measured:
    """`medlit fit` for three steps with a validation, `medlit validate`, `medlit test`, of 16 notes each."""
    import psutil

    import_llama(folder)
    source = folder / "notes"
    source.mkdir()
    for split, rows in (("train", max(96, 2 * k)), ("validation", 16), ("test", 16)):
        write_table(source / f"{split}.csv", k, rows)
    flags = f"--data.source {source} --model.language_model.base_model {folder / 'llama'} --trainer.accelerator cpu"
    flags += " --data.max_response_tokens 48 --data.batching.global_batch_size 8 --data.batching.micro_batch_size 4"
    flags += f" --trainer.enable_progress_bar false --run_dir {folder / 'run'}"
    best = "--ckpt_path best --model.decoding.mode likelihood"
    begin, peak = time.perf_counter(), 0.0
    for verb in ("fit --trainer.max_steps 3 --val_every_steps 3", f"validate {best}", f"test {best}"):
        command = [sys.executable, "-m", "medlit", *verb.split(), *flags.split()]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment(folder))
        process = psutil.Process(running.pid)
        while running.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        if running.wait():
            raise subprocess.CalledProcessError(running.returncode, command)
    return {"seconds": time.perf_counter() - begin, "peak_mib": peak}


def environment(folder: Path) -> dict[str, str]:
    """Caches in the folder, and this repository's medlit."""
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "MEDLIT_CACHE": str(folder / "cache"),
    }


STAGES: dict[str, Callable[[int, Path, int], Measured]] = {
    "metrics": metrics,
    "intervals and scores": intervals,
    "temperature": temperature,
    "answers file": answers_file,
    "confusion matrix": confusion,
    "report": report,
    "audit": audit,
    "generate": decoder("generate"),
    "constrained": decoder("constrained"),
    "likelihood": decoder("likelihood"),
    "fit, validate, test": commands,
}


def run_stage(stage: str, k: int, folder: str, notes: int) -> Measured:
    """One stage, in this process."""
    os.environ |= environment(Path(folder))
    return STAGES[stage](k, Path(folder), notes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage for every number of labels, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--notes", type=int, default=NOTES)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "labels.json")
    options = parser.parse_args(arguments)

    from medlit.atomic_io import write_json

    rows: list[dict[str, Any]] = []
    for stage in options.stages:
        for k in options.labels:
            with tempfile.TemporaryDirectory() as folder:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
                    found = other.submit(run_stage, stage, k, folder, options.notes).result()
            rounded = {"seconds": round(found["seconds"], 2), "peak_mib": round(found["peak_mib"])}
            rows.append({"labels": k, "stage": stage, **rounded})
            print(rows[-1], file=sys.stderr, flush=True)
    results = {
        "hardware": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "notes": options.notes,
        "stages": rows,
    }
    write_json(options.output, results)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """A result as Markdown: seconds and peak MiB by stage and number of labels."""
    labels = list(dict.fromkeys(row["labels"] for row in results["stages"]))
    cells = {(row["stage"], row["labels"]): f"{row['seconds']} s, {row['peak_mib']} MiB" for row in results["stages"]}
    lines = [f"| stage | {' | '.join(f'{k:,} labels' for k in labels)} |", f"| --- |{' --- |' * len(labels)}"]
    for stage in dict.fromkeys(row["stage"] for row in results["stages"]):
        lines.append("| ".join([f"| {stage} ", *(f"{cells.get((stage, k), '')} " for k in labels)]) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
