"""`medlit doctor`: check this machine before a run does, and name the cure for what is missing.

Each check is one row: what was checked, ok, warn or fail, what was found, and the cure. After a warning the job can
still run (without a GPU it is slow); a failure means that it cannot, and makes the exit code 1. The doctor uses no
network, and of an access token it reports only that there is one.

With --config, and any setting of 'medlit fit' after it, the doctor also tries the fit: the memory that it needs,
whether the labels differ as tokens, one example as the model sees it, and two training steps and one validation batch
with their times. Nothing of it is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from medlit.errors import UserError
from medlit.paths import HUB_TOKENS
from medlit.tools.doctor import checks
from medlit.tools.doctor.checks import CONFIG, EXAMPLE, REINSTALL, TRIAL, CheckResult

PROBE_SECONDS = 180  # the first import of Unsloth from a cold disk takes a minute
# Checks whose warning means that the later ones did not run.
_GATES = ("notes", "base model", TRIAL)
_EPILOG = """\
exit code: 0; 1 when a check failed and the job cannot run here; 2 after a mistake in the settings.

examples:
  medlit doctor
  medlit doctor --config configs/llama31_8b.yaml --config configs/hardware/gpu_80gb.yaml
  medlit doctor --config configs/quickstart.yaml --data.source notes.csv --show_notes
"""


def run(args: Sequence[str]) -> int:
    """Check the machine, and a config on it, and print the results.

    Args:
        args: the arguments after `medlit doctor`.

    Returns:
        0, or 1 when a check failed and the job cannot run here.

    Raises:
        UserError: a setting after `--config` is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="medlit doctor",
        usage="medlit doctor [--json] [--config FILE ... [--group.key VALUE ...] [--show_notes]]",
        description=__doc__.partition("\n\n")[2],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of check, status, found, cure")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a config to try; several are layered and flags override them, as for 'medlit fit'",
    )
    parser.add_argument(
        "--show_notes",
        action="store_true",
        help="take the example from the config's own notes, which are patients' text, instead of an invented note",
    )
    options, rest = parser.parse_known_args(args)
    if (rest or options.show_notes) and not options.config:
        parser.error(f"{' '.join(rest) or '--show_notes'}: settings need a --config beside them")
    settings = [argument for argument in args if argument not in ("--json", "--show_notes")] if options.config else []
    child = start_probe(settings, show_notes=options.show_notes)
    results = checks.installation()  # while the child imports, which takes longest
    results += read_probe(child, has_config=bool(settings))
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False))
    else:
        _print_table(results)
    return int(any(result.status == "fail" for result in results))


def start_probe(settings: Sequence[str], *, show_notes: bool) -> subprocess.Popen[str]:
    """Start `medlit.tools.doctor.probe`, without access token and network."""
    environment = {name: value for name, value in os.environ.items() if name not in HUB_TOKENS}
    environment |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, "-m", "medlit.tools.doctor.probe", *["--show_notes"] * show_notes, *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_probe(child: subprocess.Popen[str], *, has_config: bool = False) -> list[CheckResult]:
    """Wait for the child process and read its results.

    Args:
        child: the process.
        has_config: it tries a config; there is no time limit, since weights may be large and the disk slow.

    Raises:
        UserError: a setting is invalid.
    """
    if has_config:
        print("medlit doctor: trying the config too, which takes as long as loading its weights.", file=sys.stderr)
    try:
        out, err = child.communicate(timeout=None if has_config else PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return [CheckResult("libraries", "fail", f"no answer in {PROBE_SECONDS} s", REINSTALL)]
    finally:
        child.kill()  # after Ctrl-C too; harmless if it has ended
    # A library's C code may print here too.
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if lines and "mistake" in lines[-1]:
        raise UserError(lines[-1]["mistake"])
    results = [CheckResult(**line) for line in lines]
    if child.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        found = f"the checking process ended with code {child.returncode}: {last}"
        if has_config and any(result.check == "unsloth" for result in results):
            cure = "run 'medlit fit' with the same settings to see more"
            results.append(CheckResult(TRIAL, "fail", found, cure))
        else:
            results.append(CheckResult("libraries", "fail", found, REINSTALL))
    return results


def verdict(results: Sequence[CheckResult]) -> str:
    """The conclusion in one sentence."""
    status = {result.check: result.status for result in results}
    if failed := [result.check for result in results if result.status == "fail"]:
        return f"medlit cannot run here: {', '.join(failed)}."
    if CONFIG not in status:
        return "medlit can run here."
    if gates := [check for check in _GATES if status.get(check) == "warn"]:
        return f"medlit can run here; not all of the config was tried: {', '.join(gates)}."
    return "This fit can run here."


def _print_table(results: Sequence[CheckResult]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(title="medlit doctor")
    for heading in ("check", "", "found", "cure"):
        table.add_column(heading, overflow="fold")
    for row in results:
        if row.check != EXAMPLE:
            table.add_row(row.check, f"[{style[row.status]}]{row.status}[/]", escape(row.found), escape(row.cure))
    console = Console()
    console.print(table)
    for row in results:
        if row.check == EXAMPLE:  # too long for the table
            console.rule("one example: the model learns the text in double brackets")
            console.print(Text(row.found), soft_wrap=True)
            console.rule()
    console.print(verdict(results))
