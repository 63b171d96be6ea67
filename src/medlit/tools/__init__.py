"""Verbs of medlit's own, beside Lightning's: each is a module with `run(args) -> exit code`."""

from __future__ import annotations

import argparse
from pathlib import Path


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
