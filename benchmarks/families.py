"""Training speed of eight layers of each family of base models, beside Unsloth + TRL as published and at its best.

    LLAMA_TOKENIZER=folder python benchmarks/families.py --families qwen3_8b gemma2_9b --out FILE
    python benchmarks/families.py --merge FILE FILE --out FILE     results of several runs in one file
    python benchmarks/families.py --table FILE                     the result for README.md
    python benchmarks/families.py --tiny --out FILE                two layers on a CPU

Layers have their real width and window, and random weights (`shapes.FAMILIES`). Each family is a run of `train.py` with
empty compile caches. The file is written again after each row, so results are kept if the time runs out; a family or
system that fails is a row with its error, and one that is not reached has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from shapes import FAMILIES  # noqa: E402 - found by the path above
from train_trl import TUNED  # noqa: E402

PEERS = ("unsloth_trl", "unsloth_trl_tuned")
DEFAULT = (*PEERS, "medlit_80gib", "medlit_24gib")
SYSTEMS = (*DEFAULT, "medlit_80gib_fp8", "medlit_24gib_fp8")  # frozen weights in FP8
CACHES = ("TMPDIR", "MEDLIT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
BEGIN = time.perf_counter()
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Measure, merge, or show a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json")
    parser.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    parser.add_argument("--merge", type=Path, nargs="+", help="join these results in --out and do nothing else")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=DEFAULT)
    parser.add_argument("--settings", nargs="+", default=[], choices=TUNED, help="of the tuned peer, by default all")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which the run ends")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers on the CPU")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.merge:
        save(merge([json.loads(file.read_text()) for file in args.merge]), args.out)
        return
    today = datetime.now(UTC).date().isoformat()
    result: Result = {"hardware": "", "versions": {}, "date": today, "families": []}
    for family in args.families:
        if time.perf_counter() - BEGIN < args.limit:
            measure(args, family, result)
    print(table(result))
    measured = {(entry["family"], row["system"]) for entry in result["families"] for row in entry["systems"]}
    wanted = ((family, system) for family in args.families for system in args.systems)
    if missing := [" ".join(pair) for pair in wanted if pair not in measured]:
        print("not measured in time: " + ", ".join(missing), file=sys.stderr)


def measure(args: argparse.Namespace, family: str, result: Result) -> None:
    """Run `train.py` on a family; its rows go into the result as they come."""
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {family}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "train.json"
        caches = {name: str(Path(scratch) / name.lower()) for name in CACHES}
        for folder in caches.values():
            Path(folder).mkdir()
        left = args.limit - (time.perf_counter() - BEGIN)
        command = [sys.executable, HERE / "train.py", "--family", family, "--only", "systems", "--out", part]
        command += ["--steps", args.steps, "--warm_up", args.warm_up, "--limit", left]
        command += ["--settings", *args.settings] if args.settings else []
        command += ["--systems", *args.systems, *(["--tiny"] if args.tiny else [])]
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | caches, stdout=subprocess.DEVNULL, process_group=0
        )
        late = False
        try:
            while process.poll() is None and not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                late = time.perf_counter() - BEGIN > args.limit
                collect(args, family, part, result)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its peers, too
            process.wait()
        collect(args, family, part, result, None if late else f"the process ended with code {process.returncode}")


def collect(args: argparse.Namespace, family: str, part: Path, result: Result, ended: str | None = None) -> None:
    """Take over what `train.py` has measured so far.

    Args:
        args: the command line.
        family: that is measured.
        part: the file of `train.py`.
        result: receives the rows, and is written.
        ended: the error of the rows that are missing; None: they may still come.
    """
    found: Result = json.loads(part.read_text()) if part.is_file() else {}
    rows = {row["system"]: row for row in found.get("systems", ())}
    errors = {system: " ".join(error.split()) for system, error in found.get("failed", {}).items()}
    if ended:
        errors = {system: ended for system in args.systems if system not in rows} | errors
    for system, error in errors.items():
        rows[system] = {"system": system, "error": error}
    entry = {"family": family, "systems": compare(list(rows.values()))}
    before = result["families"]
    after = [other for other in before if other["family"] != family] + ([entry] if rows else [])
    if before != after:
        result |= {key: found[key] for key in ("hardware", "versions", "date") if key in found} | {"families": after}
        save(result, args.out)


def compare(rows: list[Result]) -> list[Result]:
    """The rows of a family in their order, with their speed relative to both peers."""
    speeds = {row["system"]: row["tokens_per_second"] for row in rows if "error" not in row}
    for row in rows:
        for peer in PEERS:
            if row["system"] in speeds and row["system"] != peer:
                ratio = round(speeds[row["system"]] / speeds[peer], 2) if peer in speeds else None
                row[f"x_{peer}"] = ratio
    return sorted(rows, key=lambda row: SYSTEMS.index(row["system"]))


def merge(results: list[Result]) -> Result:
    """Join results of one kind of machine: the later row counts, but an error never replaces a figure."""
    hardware = {result["hardware"] for result in results} - {""}  # nothing was measured
    if len(hardware) > 1:
        raise SystemExit(f"measured on different hardware: {', '.join(sorted(hardware))}")
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        for entry in result["families"]:
            known = rows.setdefault(entry["family"], {})
            for row in entry["systems"]:
                if "error" not in row or "error" in known.get(row["system"], {"error": ""}):
                    known[row["system"]] = row
    families = sorted(rows, key=list(FAMILIES).index)
    entries = [{"family": family, "systems": compare(list(rows[family].values()))} for family in families]
    last = next((result for result in reversed(results) if result["hardware"]), results[-1])
    return last | {"families": entries}


def save(result: Result, out: Path) -> None:
    """Write a result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(result: Result) -> str:
    """A result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        "| family | system | tokens/s | x Unsloth + TRL | x tuned | padding | peak GiB | estimated | first step, s |"
        " graphs after warm-up | adapter, millions | how |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in result["families"]:
        for row in entry["systems"]:
            begin, graphs = f"| {entry['family']} | `{row['system']}` |", row.get("graphs_compiled_after_warm_up")
            if "error" in row:
                lines.append(f"{begin} {row['error'].replace('|', '/')} |" + " |" * 9)
                continue
            ratios = " | ".join(f"{row[key]:.2f}" if row.get(key) else "" for key in (f"x_{peer}" for peer in PEERS))
            how = row.get("setting") or ("packed" if row["packs"] else "padded")
            if "setting" in row:
                how += ", end to end" if row["padding_free"] else ", padded"
                how += ", without flex attention" if row.get("flex_attention") is False else ""
            lines.append(
                f"{begin} {row['tokens_per_second']:,} | {ratios} | {row['padding']:.1%} | {row['peak_gib']} |"
                f" {row['estimated_gib'] or ''} | {row['first_step_seconds']} | {graphs} |"
                f" {row['lora_parameters'] / 1e6:.1f} | {how} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
