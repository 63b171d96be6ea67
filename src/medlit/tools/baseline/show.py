"""Systems and comparisons in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medlit.report.content import content
from medlit.report.systems import System

SHOWN = 3  # columns that a terminal has room for


def show(systems: Sequence[System], files: Sequence[Path]) -> None:
    """Print the first columns of the report's table, its sentences and where the report is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    values = content(systems, {})
    table = Table(title=f"{values['notes']} test notes, {values['classes']} specialties", title_justify="left")
    table.add_column("system", overflow="fold")
    for name in values["columns"][:SHOWN]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, cells in values["systems"]:
        table.add_row(escape(name), *(f"{value}\n{interval}".strip() for value, interval in cells[:SHOWN]))
    console = Console()
    console.print(table)
    for sentence in values["sentences"]:
        console.print(f"- {escape(sentence)}", highlight=False)
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
