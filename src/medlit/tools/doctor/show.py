"""The doctor's findings on a screen: a table, the verdict, and one example as the model is taught it."""

from __future__ import annotations

from collections.abc import Sequence

from medlit.tools.doctor.check_result import CONFIG, TRIAL, Row

# Checks whose warning says that what comes after them was not looked at.
UNTRIED = ("notes", "base model", TRIAL)
# Runs of text and whether their tokens carry loss.
Example = list[tuple[str, bool]]


def marked(example: Example) -> str:
    """The example as text, with `[[` and `]]` around what the model is taught.

    >>> marked([("Response: ", False), ("Neurology</s>", True)])
    'Response: [[Neurology</s>]]'
    """
    return "".join(f"[[{text}]]" if taught else text for text, taught in example)


def show(rows: Sequence[Row], example: Example | None) -> None:
    """Print the table, the example and the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(title="medlit doctor")
    for heading in ("check", "", "found", "cure"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.check, f"[{style[row.status]}]{row.status}[/]", escape(row.found), escape(row.cure))
    console = Console()
    console.print(table)
    if example is not None:
        coloured = console.is_terminal
        how = "in colour" if coloured else "between double brackets"
        console.rule(f"one example: what the model is taught is {how}")
        text = Text.assemble(*[(run, "bold green" if taught else "dim") for run, taught in example])
        console.print(text if coloured else Text(marked(example)), soft_wrap=True)
        console.rule()
    console.print(verdict(rows))


def verdict(rows: Sequence[Row]) -> str:
    """What it comes to, in a sentence."""
    failed = [row.check for row in rows if row.status == "fail"]
    if failed:
        return f"medlit cannot run here: {', '.join(failed)}."
    tried = {row.check: row.status for row in rows}
    if CONFIG not in tried:
        return "medlit can run here."
    untried = [check for check in UNTRIED if tried.get(check) == "warn"]
    return (
        f"medlit can run here; not all of the config was tried: {', '.join(untried)}."
        if untried
        else "This fit can run here."
    )
