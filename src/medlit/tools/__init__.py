"""Commands beside Lightning's: each is a module with `run(args) -> exit code`."""

import json
from collections.abc import Container, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import yaml

from medlit.errors import UserError


def print_table(
    title: str,
    headings: Iterable[str],
    rows: Iterable[Sequence[str]],
    numbers: Container[str] = (),
    styles: Iterable[str] = (),
) -> None:
    """Print a table without markup; `numbers` names the right-aligned columns, `styles` are rich's, one per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_number = heading in numbers
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row, style in zip_longest(rows, styles):
        table.add_row(*row, style=style)
    Console(markup=False, emoji=False).print(table)


def recorded_settings(path: Path, *trainer: str) -> list[str]:
    """What a verb recorded in its run folder, as an argument that further flags override.

    The seed, the settings of notes and model but not the adapter that it started from, and these of the trainer.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = {"seed_everything": config["seed_everything"], "data": dict(config["data"])}
        kept = {name: config["trainer"][name] for name in trainer if config["trainer"][name] is not None}
        settings |= {"model": config["model"] | {"adapter": None}, "trainer": kept}
        return ["--config", json.dumps(settings)]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        verb = path.stem.removeprefix("config_")
        raise UserError(f"run_dir: {path} is missing or damaged; run 'medlit {verb}' for it again.") from None
