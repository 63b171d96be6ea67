"""Commands beside Lightning's: each is a module with `run(args) -> exit code`."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError


def make_parser(tool: str) -> argparse.ArgumentParser:
    """Make the parser of a verb's own flags; `help/<tool>.txt` holds its usage, description and epilog."""
    text = Path(__file__).with_name("help").joinpath(f"{tool}.txt").read_text(encoding="utf-8")
    usage, description, epilog = text.split("\n---\n")
    return argparse.ArgumentParser(
        prog=f"medlit {tool}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def recorded_config(path: Path) -> dict[str, Any]:
    """Read the config that a command recorded in its run folder."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"run_dir: {path} is missing or damaged; run the command that writes it again.")
    return values
