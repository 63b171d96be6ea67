"""Latency and throughput of `medlit serve`, beside `SpecialtyPredictor` on the same notes.

    python benchmarks/serve.py                                   # the bundled 135M Llama, CPU or GPU
    python benchmarks/serve.py --adapter logs/llama31_8b/version_0 --notes 640

The service is the command itself, in its own processes. First 1, 8 and 32 clients send one note at a time, each its
next one when it has an answer: latencies are of single requests, as a client sees them. Then 4 clients send requests
of up to 64 notes. `SpecialtyPredictor` answers the same notes in one call, in a process of its own. Both rates are also
given by the CPU time of all their processes, which other work on the machine does not disturb; on a CPU the service's
share of the predictor's rate is of these. `--malformed` sends that many requests that no service should accept, and
counts the answers by their code. Without `--adapter` one is made, untrained. Writes `benchmarks/results/serve.json`.
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
from collections.abc import Iterator, Sequence
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
        "notes_a_request": len(requests[0]),
        "requests": len(requests),
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


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and those that it has started."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def predictor_seconds(adapter: Path, texts: list[str]) -> tuple[float, float]:
    """Seconds and CPU seconds of `SpecialtyPredictor`, in a process of its own, after a batch that does not count."""
    code = (
        "import json, sys, time\nfrom medlit import SpecialtyPredictor\n"
        "texts = json.load(sys.stdin)\npredictor = SpecialtyPredictor.load(sys.argv[1])\n"
        "predictor.predict(texts[:8])\nbegin, cpu = time.perf_counter(), time.process_time()\n"
        "predictor.predict(texts)\n"
        "print(time.perf_counter() - begin, time.process_time() - cpu)"
    )
    command = [sys.executable, "-c", code, str(adapter)]
    done = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--adapter", type=Path, default=None, help="an adapter or run folder, instead of an untrained one"
    )
    parser.add_argument("--base_model", default="builtin:smollm2-135m", help="of the untrained adapter")
    parser.add_argument("--notes", type=int, default=256, help="notes of the bulk requests and of the predictor")
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
    on_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adapter": options.adapter.name if options.adapter else f"untrained, of {Path(options.base_model).name}",
        "date": datetime.date.today().isoformat(),
        "systems": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or write_untrained(Path(folder), options.base_model)
        wall, cpu = predictor_seconds(adapter, texts)
        results["predictor"] = {"notes_per_second": len(texts) / wall, "notes_per_cpu_second": len(texts) / cpu}
        print(f"SpecialtyPredictor: {len(texts) / wall:.2f} notes/s, {len(texts) / cpu:.2f} a CPU second")
        with service(adapter, options.port) as (pid, printed):
            timed(options.port, texts[:8])
            print("| clients | notes a request | p50, ms | p99, ms | notes/s |\n| --- | --- | --- | --- | --- |")
            singles = [(clients, invented(count)) for clients, count in zip(CLIENTS, options.requests, strict=True)]
            loads = [(clients, [[text] for text in found]) for clients, found in singles]
            size = min(BULK_NOTES, len(texts) // BULK_CLIENTS)
            bulk = [texts[begin : begin + size] for begin in range(0, len(texts), size)]
            for clients, requests in [*loads, (BULK_CLIENTS, bulk)]:
                before = cpu_seconds(pid)
                row = load(options.port, clients, requests)
                row["notes_per_cpu_second"] = sum(map(len, requests)) / (cpu_seconds(pid) - before)
                results["systems"].append(row)
                cells = ("clients", "notes_a_request", "p50_ms", "p99_ms", "notes_per_second")
                print("| " + " | ".join(str(row[name]) for name in cells) + " |", flush=True)
            results["malformed"] = malformed(options.port, options.malformed)
        results["tracebacks"] = sum("Traceback" in line for line in printed)
    rate = "notes_per_second" if on_gpu else "notes_per_cpu_second"
    results["share_of_the_predictor"] = round(results["systems"][-1][rate] / results["predictor"][rate], 3)
    print(json.dumps({name: value for name, value in results.items() if name != "systems"}, indent=2))
    with atomic_write(options.output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
