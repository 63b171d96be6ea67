"""Time and memory to audit a million notes, and to start training on them.

    python benchmarks/audit.py [--rows 1000000] [--folder DIR] [--stages audit "audit again"]

Writes a CSV of invented notes of 3 KB each (3 % of them copies, 1 % copies with another label), then runs each stage
in a process of its own with two threads: `medlit audit` (CSV to Arrow, hashes, exact duplicates, lengths), the same
from the cache, the first start of training (split, tokens of the bundled model, first micro-batch), and the second from
the cache. Time is the whole process's. Private memory is what a process needs; resident memory (the kernel's maximum
resident set size) counts the pages of the mapped Arrow files too, which the system takes back when it wants them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPECIALTIES = ("Cardiology", "Neurology", "Orthopedic", "Radiology", "Nephrology", "Ophthalmology")
NOTE_BYTES = 3_000


def write_notes(path: Path, rows: int) -> None:
    """Write a table of notes, seeded."""
    draw = random.Random(3407)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 10))) for _ in range(5_000)]
    sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(50_000)]
    first: list[str] = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "transcription", "medical_specialty"])
        for row in range(rows):
            kind = draw.random()
            label = draw.choice(SPECIALTIES)
            if kind < 0.04 and first:
                copied = draw.randrange(len(first))
                note = first[copied]
                label = SPECIALTIES[copied % len(SPECIALTIES)] if kind < 0.03 else label
            else:
                note, size = "", 0
                parts = []
                while size < NOTE_BYTES:
                    parts.append(draw.choice(sentences))
                    size += len(parts[-1]) + 1
                note = " ".join(parts)
                if len(first) < 10_000:
                    label = SPECIALTIES[len(first) % len(SPECIALTIES)]
                    first.append(note)
            writer.writerow([f"note-{row:07d}", note, label])


def start_training(path: Path) -> str:
    """What a fit does before its first step: read, split, tokenize, and collate the first micro-batch."""
    import pyarrow.parquet as pq

    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.settings import Split

    data = TranscriptionDataModule(str(path), split=Split("grouped"))
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    if data.splits is None:
        raise RuntimeError("setup has not run")
    pq.write_table(data.splits.record, path.with_name("split.parquet"))
    splits = ", ".join(f"{name} {len(data.rows(name))} ({digits[:8]})" for name, digits in data.splits.hashes.items())
    return f"{splits}; first micro-batch {tuple(first.input_ids.shape)}"


STAGES = ("audit", "audit again", "first start", "second start")


def command_of(stage: str, folder: Path) -> list[str]:
    """The command of a stage."""
    if stage.startswith("audit"):
        arguments = ["-m", "medlit", "audit", "--data.source", f"{folder / 'notes.csv'}", "--output", f"{folder}"]
    else:
        arguments = [__file__, "--start", f"{folder / 'notes.csv'}"]
    return [sys.executable, *arguments]


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, str]:
    """Run a command; return seconds, peak private and resident memory in GiB, and its last line of output."""
    import psutil

    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        running = subprocess.Popen(command, env=environment, stdout=printed)
        process, private, ended = psutil.Process(running.pid), 0, 0
        while not ended:
            memory = process.memory_info()
            private = max(private, memory.rss - memory.shared)
            time.sleep(0.2)
            ended, status, usage = os.wait4(running.pid, os.WNOHANG)
        seconds = time.perf_counter() - begin
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            raise subprocess.CalledProcessError(running.returncode, command)
        printed.seek(0)
        return seconds, private / 2**30, usage.ru_maxrss / 2**20, printed.read().splitlines()[-1]


def found_by_audit(folder: Path) -> str:
    """The counts that an audit wrote."""
    report = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    duplicates, conflicts, tokens = report["duplicates"], report["conflicts"], report["lengths"]["tokens"]
    return (
        f"{report['rows']} rows, {duplicates['rows']} in {duplicates['groups']} duplicate groups, "
        f"{conflicts['rows']} in {conflicts['groups']} conflicts, ceiling {report['accuracy_ceiling']:.4f}, "
        f"{tokens['mean']} tokens a note"
    )


def main() -> None:
    """Write the notes, then run every stage in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where notes and caches go (15 GB; default: a temporary folder)"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run, in this order")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        print(start_training(options.start))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_notes(folder / "notes.csv", options.rows)
        print(f"{options.rows} notes, {(folder / 'notes.csv').stat().st_size / 2**30:.2f} GiB\n")
        print("| stage | time | peak memory: private / resident | found |\n| --- | --- | --- | --- |", flush=True)
        environment = os.environ | {
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "2",
            "RAYON_NUM_THREADS": "2",
        }
        for stage in options.stages:
            seconds, private, resident, last = measure(command_of(stage, folder), environment)
            found = found_by_audit(folder) if stage.startswith("audit") else last
            print(f"| {stage} | {seconds:.1f} s | {private:.2f} / {resident:.2f} GiB | {found} |", flush=True)


if __name__ == "__main__":
    main()
