"""Latency and throughput of `medlit serve`, beside `SpecialtyPredictor` on the same notes.

    python benchmarks/serve.py                                   # the bundled 135M Llama, CPU or GPU
    python benchmarks/serve.py --adapter logs/llama31_8b/version_0 --notes 640

The service is the command itself, in its own processes. First 1, 8 and 32 clients send one note at a time, each its
next one when it has an answer: latencies are of single requests, as a client sees them. Then the service, in requests
of up to 64 notes from 4 clients, and `SpecialtyPredictor`, in one call in another process, take turns with the same
notes; the share is the median of the rounds' ratios. It is given by the clock and by the CPU time of all their
processes, which other work on the machine disturbs less. Last come `--malformed` requests that no service should
accept; their answers are counted by code. Without `--adapter` one is made, untrained. Writes
`benchmarks/results/serve.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from predictor import invented, write_untrained

RESULTS = Path(__file__).parent / "results" / "serve.json"
CLIENTS, BULK_CLIENTS, BULK_NOTES = (1, 8, 32), 4, 64
_THREAD = threading.local()  # a connection for each client


def send(port: int, body: bytes, kind: str = "application/json") -> int:
    """Send a body over the thread's connection; the code of the answer."""
    if getattr(_THREAD, "port", None) != port:
        _THREAD.port, _THREAD.connection = port, HTTPConnection("127.0.0.1", port)
    _THREAD.connection.request("POST", "/v1/classify", body, {"Content-Type": kind})
    response = _THREAD.connection.getresponse()
    response.read()
    return int(response.status)


def timed(port: int, notes: list[str]) -> float:
    """Seconds of a request that must be answered."""
    begin = time.perf_counter()
    code = send(port, json.dumps({"notes": notes}).encode())
    if code != 200:
        raise RuntimeError(f"the service answered {code}")
    return time.perf_counter() - begin


def load(port: int, clients: int, requests: list[list[str]]) -> dict[str, Any]:
    """Send requests from so many clients; latencies in milliseconds and notes a second."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        took = sorted(pool.map(lambda notes: timed(port, notes), requests))
    seconds = time.perf_counter() - begin
    quantiles = statistics.quantiles(took, n=100, method="inclusive")
    return {
        "clients": clients,
        "p50_ms": round(1000 * quantiles[49], 1),
        "p99_ms": round(1000 * quantiles[98], 1),
        "notes_per_second": round(sum(map(len, requests)) / seconds, 2),
    }


def malformed(port: int, count: int) -> dict[str, int]:
    """Answers to bodies that are cut, spoilt or of another form, by code."""
    dice = random.Random(3407)
    valid = json.dumps({"notes": ["CHIEF COMPLAINT: a cough.", "A broken bone."]}).encode()

    def body() -> tuple[bytes, str]:
        kind = dice.choice(["application/json"] * 4 + ["text/plain", "multipart/form-data; boundary=x"])
        others = [{}, [], "x", {"notes": 1}, {"notes": [None]}, {"notes": [""]}, {"notes": ["x"] * 257}, {"note": "x"}]
        spoilt = [valid[: dice.randrange(len(valid))], dice.randbytes(dice.randrange(200)), b"[" * 10_000]
        return dice.choice([*spoilt, json.dumps(dice.choice(others)).encode()]), kind

    with ThreadPoolExecutor(8) as pool:
        codes = Counter(pool.map(lambda each: send(port, *each), [body() for _ in range(count)]))
    return {str(code): codes[code] for code in sorted(codes)}


@contextmanager
def service(adapter: Path, port: int) -> Iterator[tuple[int, list[str]]]:
    """Run the service; its process id, and a list of what it printed once it has ended."""
    command = [sys.executable, "-m", "medlit", "serve", "--run_dir", str(adapter), "--port", str(port)]
    printed: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()))
        reader.start()
        try:
            while True:
                connection = HTTPConnection("127.0.0.1", port)
                try:
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError("".join(printed)) from None
                time.sleep(0.2)
            yield process.pid, printed
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            reader.join()


PREDICTOR = """
import json, sys
from medlit import SpecialtyPredictor
predictor = SpecialtyPredictor.load(sys.argv[1])
for line in sys.stdin:
    predictor.predict(json.loads(line))
    print("done", flush=True)
"""


@contextmanager
def predictor(adapter: Path) -> Iterator[tuple[int, Callable[[list[str]], None]]]:
    """Load `SpecialtyPredictor` in a process; its id, and a function that waits until it has answered notes."""
    command = [sys.executable, "-c", PREDICTOR, str(adapter)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def predict(texts: list[str]) -> None:
            print(json.dumps(texts), file=process.stdin, flush=True)
            if not any(line == "done\n" for line in process.stdout or ()):
                raise RuntimeError("the predictor's process has ended")

        try:
            yield process.pid, predict
        finally:
            process.communicate()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and those that it has started."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def rates(pid: int, notes: int, work: Callable[[], object]) -> tuple[float, float]:
    """Notes a second, and a CPU second of the process."""
    begin, cpu = time.perf_counter(), cpu_seconds(pid)
    work()
    return notes / (time.perf_counter() - begin), notes / (cpu_seconds(pid) - cpu)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--adapter", type=Path, default=None, help="an adapter or run folder, instead of an untrained one"
    )
    parser.add_argument("--base_model", default="builtin:smollm2-135m", help="of the untrained adapter")
    parser.add_argument("--notes", type=int, default=256, help="notes of the service and the predictor in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs=len(CLIENTS), default=[32, 96, 192], help="for 1, 8, 32 clients")
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch

    from medlit.atomic_io import atomic_write

    texts = invented(options.notes)
    results: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adapter": options.adapter.name if options.adapter else f"untrained, of {Path(options.base_model).name}",
        "date": datetime.date.today().isoformat(),
        "notes": len(texts),
        "clients": [],
    }
    size = min(BULK_NOTES, -(-len(texts) // BULK_CLIENTS))
    bulk = [texts[begin : begin + size] for begin in range(0, len(texts), size)]
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or write_untrained(Path(folder), options.base_model)
        with service(adapter, options.port) as (served, printed), predictor(adapter) as (pid, predict):
            timed(options.port, texts[:8])
            predict(texts[:8])
            print("| clients | p50, ms | p99, ms | notes/s |\n| --- | --- | --- | --- |", flush=True)
            for clients, count in zip(CLIENTS, options.requests, strict=True):
                row = load(options.port, clients, [[text] for text in invented(count)])
                results["clients"].append(row)
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
            pairs = []
            for _ in range(options.rounds):
                ours = rates(served, len(texts), lambda: load(options.port, BULK_CLIENTS, bulk))
                theirs = rates(pid, len(texts), lambda: predict(texts))
                pairs.append((*ours, *theirs))
                print(f"service {ours[0]:.2f} notes/s, SpecialtyPredictor {theirs[0]:.2f}", flush=True)
            for name, place in (("second", 0), ("cpu_second", 1)):
                results[f"notes_per_{name}"] = {
                    "service": round(statistics.median(pair[place] for pair in pairs), 3),
                    "predictor": round(statistics.median(pair[place + 2] for pair in pairs), 3),
                    "shares": [round(pair[place] / pair[place + 2], 3) for pair in pairs],
                    "share": round(statistics.median(pair[place] / pair[place + 2] for pair in pairs), 3),
                }
            results["malformed"] = malformed(options.port, options.malformed)
        results["tracebacks"] = sum("Traceback" in line for line in printed)
    print(json.dumps({name: value for name, value in results.items() if name != "clients"}, indent=2))
    with atomic_write(options.output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
