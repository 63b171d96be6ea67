"""`medlit doctor`: look at this machine before a run does, and say how to mend what is missing.

Every check is one row: what was looked at, ok, warn or fail, what was found, and the cure. A warning leaves the job
possible (no GPU: it is slow); a failure does not, and makes the exit code 1. Nothing is sent or fetched over the
network, and of an access token only its presence is looked at.

With --config, and any setting of 'medlit fit' behind it, the fit is tried too: whether it will fit into memory, whether
the labels can be told apart as tokens, what one example looks like to the model, and two training steps and one
validation step with the clock running. Nothing of it is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medlit.errors import UserError
from medlit.paths import HUB_TOKENS
from medlit.tools.doctor import installed, machine
from medlit.tools.doctor.check_result import EXAMPLE, TRIAL, Row
from medlit.tools.doctor.machine import Facts
from medlit.tools.doctor.show import Example, marked, show

PROBE_SECONDS = 180  # a first import of Unsloth on a cold disk takes a minute
_EPILOG = """\
exit code: 0; 1 when a check failed and the job cannot run here; 2 after a mistake in the settings.

examples:
  medlit doctor
  medlit doctor --config configs/llama31_8b.yaml --config configs/hardware/gpu_80gb.yaml
  medlit doctor --config configs/quickstart.yaml --data.source notes.csv --show_notes
"""


@dataclass
class Probed:
    """What the child process told.

    Attributes:
        facts: what was found, by library; under `crash`, why the child ended too early.
        rows: what was found of a config.
        example: one note as the model is taught it, in runs of text; None where there is none to show.
    """

    facts: Facts = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    example: Example | None = None


def run(args: Sequence[str]) -> int:
    """Check the machine, and a config on it, and print what was found.

    Args:
        args: the arguments after `medlit doctor`.

    Returns:
        0, or 1 when a check failed and the job cannot run here.

    Raises:
        UserError: a setting behind `--config` is not understood.
    """
    parser = argparse.ArgumentParser(
        prog="medlit doctor",
        usage="medlit doctor [--json] [--config FILE ... [--group.key VALUE ...] [--show_notes]]",
        description=__doc__.partition("\n\n")[2],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print the rows as a JSON list of check, status, found, cure"
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a config to try; several are layered, and flags override them, as for 'medlit fit'",
    )
    parser.add_argument(
        "--show_notes",
        action="store_true",
        help="take the example from the config's own notes, which are patients' text, instead of an invented note",
    )
    options, rest = parser.parse_known_args(args)
    if (rest or options.show_notes) and not options.config:
        parser.error(f"{' '.join(rest) or '--show_notes'}: settings are looked at together with a --config")
    settings = [argument for argument in args if argument not in ("--json", "--show_notes")] if options.config else []
    rows, example = examine(settings, show_notes=options.show_notes)
    if options.json:
        told = [
            asdict(row) | {"found": f"{row.found}: {marked(example)}"}
            if row.check == EXAMPLE and example
            else asdict(row)
            for row in rows
        ]
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        show(rows, example)
    return int(any(row.status == "fail" for row in rows))


def examine(settings: Sequence[str] = (), *, show_notes: bool = False) -> tuple[list[Row], Example | None]:
    """Every check, in the order in which a cure may mend the next.

    Args:
        settings: `--config` files and flags of a fit to try; none: the machine alone.
        show_notes: take the example from the config's own notes.

    Returns:
        The rows, and the example of a config.

    Raises:
        UserError: a setting is not understood.
    """
    child = start(settings, show_notes=show_notes)
    # While the child imports, which takes longer than all else together.
    here = [
        *installed.packages(),
        installed.bundled_weights(),
        installed.cache(),
        installed.hub_cache(),
        installed.hub(),
        installed.token(),
    ]
    probed = gather(child, patient=bool(settings))
    facts = probed.facts
    rows = [
        machine.python(),
        machine.system(),
        machine.torch(facts),
        *machine.gpus(facts),
        machine.driver(facts),
        machine.nvcc(),
        machine.imported("bitsandbytes", facts),
        machine.quantised(facts),
        machine.triton(facts),
        machine.imported("unsloth", facts),
        *here,
        *installed.lock(facts),
        *probed.rows,
    ]
    if settings and "crash" in facts and "unsloth" in facts:
        rows.append(Row(TRIAL, "fail", facts["crash"]["error"], "run 'medlit fit' with the same settings to see more"))
    return rows, probed.example


def start(settings: Sequence[str], *, show_notes: bool) -> subprocess.Popen[str]:
    """Start the process of `medlit.tools.doctor.probe`."""
    # The child gets no token and no network: it can neither tell the one nor use the other.
    environment = {name: value for name, value in os.environ.items() if name not in HUB_TOKENS}
    environment |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, "-m", "medlit.tools.doctor.probe", *["--show_notes"] * show_notes, *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gather(child: subprocess.Popen[str], *, patient: bool = False) -> Probed:
    """Wait for the child and read what it found.

    Args:
        child: the process.
        patient: wait as long as it takes: a config's weights may be large and the disk slow.

    Raises:
        UserError: a setting is not understood.
    """
    probed = Probed()
    if patient:
        print("medlit doctor: the config is tried too, which takes as long as loading its weights.", file=sys.stderr)
    try:
        out, err = child.communicate(timeout=None if patient else PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probed.facts = {"crash": {"error": f"no answer in {PROBE_SECONDS} s"}}
        return probed
    finally:
        child.kill()  # also after Ctrl-C; one that has ended does not mind
    for line in out.splitlines():
        if line.startswith("{"):  # a library's C code may print here too
            _read(json.loads(line), probed)
    if child.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        probed.facts["crash"] = {"error": f"the checking process ended with code {child.returncode}: {last}"}
    return probed


def _read(finding: dict[str, Any], probed: Probed) -> None:
    if "mistake" in finding:
        raise UserError(finding["mistake"])
    if "row" in finding:
        probed.rows.append(Row(**finding["row"]))
    elif "example" in finding:
        probed.example = [(text, taught) for text, taught in finding["example"]]
    else:
        probed.facts |= finding
