"""How long, and in how much memory, are a million notes audited, and how long does training on them take to start?

    python benchmarks/audit.py [--rows 1000000] [--folder DIR]

Writes a CSV of invented notes of 3 KB each (3 % of them copies, 1 % copies with another label), then runs each stage
in a process of its own with two threads: the first audit (CSV to Arrow, hashes, exact duplicates), the second from the
cache, the first start of training (split, tokens of the bundled model, first micro-batch), and the second from the
cache. Private memory is what a process needs; resident memory counts the pages of the mapped Arrow files too, which the
system takes back when it wants them.
"""

from __future__ import annotations

import argparse
import csv
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


def audit_notes(path: Path) -> str:
    """Audit with exact duplicates, as `medlit audit` does."""
    from medlit.data.audit import audit
    from medlit.data.sources import Columns, Labels

    report = audit(str(path), columns=Columns(), labels=Labels()).report
    return (
        f"{report.rows} rows, {report.duplicates['rows']} in {report.duplicates['groups']} duplicate groups, "
        f"{report.conflicts['rows']} in {report.conflicts['groups']} conflicts, ceiling {report.accuracy_ceiling:.4f}"
    )


def start_training(path: Path) -> str:
    """What a fit does before its first step: read, split, tokenize, and deal the first micro-batch."""
    from medlit.data.datamodule import TranscriptionDataModule

    data = TranscriptionDataModule(str(path), split="grouped")
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    if data.partition is None:
        raise RuntimeError("setup has not run")
    data.partition.write(path.with_name("split.parquet"))
    splits = ", ".join(
        f"{name} {len(data.rows(name))} ({digits[:8]})" for name, digits in data.partition.hashes.items()
    )
    return f"{splits}; first micro-batch {tuple(first.input_ids.shape)}"


STAGES = {
    "audit": audit_notes,
    "audit again": audit_notes,
    "first start": start_training,
    "second start": start_training,
}


def run_stage(name: str, path: Path) -> None:
    """Run one stage in this process and print its row."""
    import threading

    import psutil

    private = resident = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal private, resident
        process = psutil.Process()
        while not done.wait(0.2):
            memory = process.memory_info()
            private = max(private, memory.rss - memory.shared)
            resident = max(resident, memory.rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    found = STAGES[name](path)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    print(f"| {name} | {seconds:.1f} s | {private / 2**30:.2f} / {resident / 2**30:.2f} GiB | {found} |", flush=True)


def main() -> None:
    """Write the notes, then run every stage in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where notes and caches go (15 GB; default: a temporary folder)"
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        run_stage(options.stage, options.folder / "notes.csv")
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
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
