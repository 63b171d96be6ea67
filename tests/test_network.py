"""With a network, medlit contacts the Hub only: neither Unsloth's statistics nor telemetry.

The process that shows it also shows what a new process prints: an answer on standard output, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Medlit

# Refuses, and writes down, every connection and every look-up of a name but those of the Hub's stand-in; then runs
# medlit once for each list of arguments. Installed before anything is imported.
GUARDED = """
import json, os, sys
hub, runs, report = json.loads(sys.argv[1])
others = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        asked = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked = tuple(arguments[:2])
    else:
        return
    if isinstance(asked, tuple) and list(asked[:2]) != hub:
        others.append(repr(asked))
        raise OSError("no network here")
sys.addaudithook(guard)
from medlit.__main__ import main
codes, files = [], []
for arguments in runs:
    print("=== run", file=sys.stderr, flush=True)
    try:
        main(arguments)
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code)
    files.append(sum((found for _, _, found in os.walk(".")), []))
open(report, "w").write(json.dumps({"codes": codes, "others": others, "files": files}))
"""


class Hub(BaseHTTPRequestHandler):
    """Knows no repository."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, int, list[str]]]:
    """Address of an empty Hub, and the paths requested from it."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "127.0.0.1", server.server_address[1], asked
    server.shutdown()


def guarded(hub: tuple[str, int, list[str]], tmp_path: Path, *runs: list[str]) -> tuple[dict[str, Any], list[str], str]:
    """Run medlit in a process that knows the Hub's stand-in alone; its report, each run's messages, and the output."""
    host, port, _ = hub
    # What the tests are given, and what Unsloth makes of it when it is imported.
    kept_off = ("OFFLINE", "UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if not name.endswith(kept_off)}
    environment |= {"HF_ENDPOINT": f"http://{host}:{port}", "PYTHONPATH": os.pathsep.join(sys.path)}
    argument = json.dumps([[host, port], runs, str(tmp_path / "report.json")])
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, argument], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "report.json").read_text()), done.stderr.split("=== run\n")[1:], done.stdout


def test_only_the_hub_is_contacted_missing_repositories_are_reported_and_an_answer_alone_is_printed(
    hub: tuple[str, int, list[str]], run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    config = ["--config", str(tiny_config)]
    one_note = ["predict", *config, "--ckpt_path", "best", "--data.predict.text", "Since Monday:\nheart pain."]
    here = run_medlit(*one_note).out
    before = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    report, said, printed = guarded(
        hub,
        tmp_path,
        one_note,
        ["fit", *config, "--model.language_model.base_model", "nobody/no-llama"],
        ["fit", *config, "--data.source", "nobody/no-notes"],
        ["fit", *config, "--trainer.max_steps", "1"],
    )
    assert report["others"] == []
    assert report["codes"] == [0, 2, 2, 0], said
    assert printed == here
    assert sorted(report["files"][0]) == sorted(before)
    for words, key, name in zip(
        said[1:], ("model.language_model.base_model", "data.source"), ("llama", "notes"), strict=False
    ):
        told = [line for line in words.splitlines() if line.startswith("medlit: ")]
        assert len(told) == 1, words
        assert told[0].startswith(f"medlit: {key}: nobody/no-{name}")
        assert "Traceback" not in words
        assert any(f"nobody/no-{name}" in path for path in hub[2]), hub[2]


def test_the_guard_guards(hub: tuple[str, int, list[str]], tmp_path: Path) -> None:
    """Another port of the same machine is refused too."""
    ask = "import urllib.request as u\ntry:\n    u.urlopen('http://127.0.0.1:9')\nexcept OSError: pass\n"
    host, port, _ = hub
    script = GUARDED.replace("from medlit.__main__ import main\n", f"{ask}u.urlopen\nmain = None\n")
    argument = json.dumps([[host, port], [], str(tmp_path / "report.json")])
    subprocess.run([sys.executable, "-c", script, argument], check=True)
    assert len(json.loads((tmp_path / "report.json").read_text())["others"]) == 1
