"""Commands beside Lightning's: each is a module with `run(args) -> exit code`."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError

_TYPES = {"int": int, "float": float, "path": Path}


def make_parser(tool: str, **filled: object) -> argparse.ArgumentParser:
    """Make the parser of a verb's own flags, from its texts and flags in `help/`; braces in these are filled."""
    folder = Path(__file__).with_name("help")
    usage, text, epilog = (folder / f"{tool}.txt").read_text(encoding="utf-8").split("\n---\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"medlit {tool}", usage, text, epilog, formatter_class=shape, allow_abbrev=False)
    flags: dict[str, dict[str, Any]] = yaml.safe_load((folder / f"{tool}.yaml").read_text(encoding="utf-8"))
    for name, flag in flags.items():
        kind = {"type": _TYPES[flag["type"]]} if "type" in flag else {}
        parser.add_argument(f"--{name}", **flag | kind | {"help": flag["help"].format(**filled)})
    return parser


def recorded_settings(path: Path, *trainer: str) -> dict[str, Any]:
    """The seed and the settings of notes and model that a verb recorded in its run folder, and these of its trainer."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = {"seed_everything": config["seed_everything"], "data": dict(config["data"])}
        kept = {name: config["trainer"][name] for name in trainer if config["trainer"][name] is not None}
        return settings | {"model": dict(config["model"]), "trainer": kept}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        verb = path.stem.removeprefix("config_")
        raise UserError(f"run_dir: {path} is missing or damaged; run 'medlit {verb}' for it again.") from None
