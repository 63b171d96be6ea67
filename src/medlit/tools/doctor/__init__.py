"""`medlit doctor`: look at this machine before a run does, and say how to mend what is missing.

Every check is one row: what was looked at, ok, warn or fail, what was found, and the cure. A warning leaves the job
possible (no GPU: it is slow); a failure does not, and makes the exit code 1. Nothing is sent or fetched over the
network, and of an access token only its presence is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from medlit.tools.doctor import installed, machine
from medlit.tools.doctor.machine import Facts
from medlit.tools.doctor.row import TOKENS, Row

PROBE_SECONDS = 180  # a first import of Unsloth on a cold disk takes a minute


def run(args: Sequence[str]) -> int:
    """Check the machine and print what was found.

    Args:
        args: the arguments after `medlit doctor`.

    Returns:
        0, or 1 when a check failed and the job cannot run here.
    """
    parser = argparse.ArgumentParser(prog="medlit doctor", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--json", action="store_true", help="print the rows as a JSON list of check, status, found, cure"
    )
    options = parser.parse_args(args)
    rows = examine()
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show(rows)
    return int(any(row.status == "fail" for row in rows))


def examine() -> list[Row]:
    """Every check, in the order in which a cure may mend the next."""
    facts = gather()
    return [
        machine.python(),
        machine.system(),
        machine.torch(facts),
        *machine.gpus(facts),
        machine.driver(),
        machine.nvcc(),
        machine.imported("bitsandbytes", facts),
        machine.imported("unsloth", facts),
        *installed.packages(),
        installed.bundled_weights(),
        installed.cache(),
        installed.hub(),
        installed.token(),
    ]


def gather() -> Facts:
    """What a child process of `medlit.tools.doctor.probe` found, by library; under `crash`, why it ended too early."""
    # The child gets no token and no network: it can neither tell the one nor use the other.
    child = {name: value for name, value in os.environ.items() if name not in TOKENS}
    child |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, "-m", "medlit.tools.doctor.probe"]
    try:
        done = subprocess.run(command, env=child, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"crash": {"error": f"no answer in {PROBE_SECONDS} s"}}
    facts: Facts = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # a library's C code may print here too
            facts |= json.loads(line)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        facts["crash"] = {"error": f"the import ended the process with code {done.returncode}: {last}"}
    return facts


def _show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(title="medlit doctor")
    for heading in ("check", "", "found", "cure"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.check, f"[{style[row.status]}]{row.status}[/]", escape(row.found), escape(row.cure))
    failed = [row.check for row in rows if row.status == "fail"]
    console = Console()
    console.print(table)
    console.print(f"medlit cannot run here: {', '.join(failed)}." if failed else "medlit can run here.")
