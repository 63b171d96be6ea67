"""An audit as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medlit.data.audit import SHORT, AuditReport


def show(report: AuditReport) -> None:
    """Print a report: counts, shares and the first row ids of every finding."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"medlit audit: {escape(report.source)}", title_justify="left")
    table.add_column("what")
    table.add_column("found", justify="right")
    table.add_column("in words", overflow="fold")
    for what, found, words in _rows(report):
        table.add_row(what, found, escape(words), style="yellow" if words else "")
    classes = Table(title="notes of each specialty", title_justify="left")
    classes.add_column("specialty")
    for split in report.splits:
        classes.add_column(split, justify="right")
    classes.add_column("share", justify="right")
    for name, notes in report.classes.items():
        counts = [str(report.classes_by_split[split].get(name, 0)) for split in report.splits]
        classes.add_row(escape(name), *counts, f"{notes / report.rows:.1%}")
    console = Console()
    console.print(table)
    console.print(classes)


def _rows(report: AuditReport) -> Iterator[tuple[str, str, str]]:
    splits = ", ".join(f"{name} {rows}" for name, rows in report.splits.items())
    yield f"notes ({splits})", str(report.rows), ""
    yield "specialties", str(len(report.classes)), ""
    yield "notes without a specialty", str(report.unlabelled), ""
    for unit, lengths in report.lengths.items():
        points = " / ".join(f"{lengths[name]:,.0f}" for name in ("mean", "p50", "p95", "max"))
        yield f"{unit} a note: mean / median / p95 / max", points, ""
    tokens = report.lengths.get("tokens")
    if tokens is not None:
        cut = tokens["share_cut"]
        yield f"notes longer than {tokens['limit']} tokens", f"{cut:.1%}", "they are cut" if cut else ""
    yield "empty notes", str(report.empty["rows"]), _ids(report.empty)
    yield f"notes of under {SHORT} words", str(report.short["rows"]), _ids(report.short)
    yield "notes whose text occurs again", *_groups(report.duplicates)
    if report.near_duplicates is not None:
        yield f"notes like another (Jaccard >= {report.near_threshold})", *_groups(report.near_duplicates)
    yield "notes whose text has several labels", *_groups(report.conflicts)
    yield "ceiling on accuracy that these imply", f"{report.accuracy_ceiling:.1%}", ""
    for pair, rows in report.leakage.items():
        earlier, _, later = pair.partition("/")
        near = 0 if report.near_leakage is None else report.near_leakage[pair] - rows
        yield f"{later} notes that stand in {earlier}", str(rows), f"and {near} more nearly" if near else ""
    for name, told in report.label_leaks.items():
        yield f"column {name!r} gives the label away", f"{told:.1%}", "of its values"


def _ids(finding: dict[str, Any]) -> str:
    ids: list[str] = finding["ids"][:5]
    return ", ".join(ids) + (" ..." if finding["rows"] > len(ids) else "")


def _groups(finding: dict[str, Any]) -> tuple[str, str]:
    groups: list[list[str]] = finding["ids"][:3]
    words = "; ".join(" = ".join(ids) for ids in groups) + (" ..." if finding["groups"] > len(groups) else "")
    return str(finding["rows"]), f"{finding['groups']} groups: {words}" if finding["groups"] else ""
