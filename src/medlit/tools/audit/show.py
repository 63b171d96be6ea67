"""An audit as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from medlit.data.audit import NEAR_ROWS, SHORT, AuditReport


class Line(NamedTuple):
    """One line of the table.

    Attributes:
        what: what was looked at.
        found: a count, a share or a length.
        which: the first row ids behind it, or more numbers.
        alarming: whether somebody should look.
    """

    what: str
    found: str
    which: str = ""
    alarming: bool = False


def show(report: AuditReport) -> None:
    """Print a report: counts, shares and the first row ids of every finding."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"medlit audit: {escape(report.source)}", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    for line in _lines(report):
        table.add_row(escape(line.what), line.found, escape(line.which), style="yellow" if line.alarming else "")
    classes = Table(title="notes of each specialty", title_justify="left")
    classes.add_column("specialty")
    for split in report.splits:
        classes.add_column(split, justify="right")
    classes.add_column("share", justify="right")
    for name, notes in report.classes.items():
        counts = [f"{report.classes_by_split[split].get(name, 0):,}" for split in report.splits]
        classes.add_row(escape(name), *counts, f"{notes / report.rows:.1%}")
    console = Console()
    console.print(table)
    console.print(classes)


def _lines(report: AuditReport) -> Iterator[Line]:
    several = len(report.splits) > 1
    splits = ", ".join(f"{name} {rows:,}" for name, rows in report.splits.items())
    yield Line("notes", f"{report.rows:,}", splits if several else "one table without splits")
    yield Line("specialties", f"{len(report.classes):,}")
    yield Line("notes without a specialty", *_of(report.unlabelled, report.rows), alarming=report.unlabelled > 0)
    for unit, lengths in report.lengths.items():
        spread = ", ".join(f"{name} {lengths[name]:,.0f}" for name in ("mean", "p95", "max"))
        yield Line(f"{unit} in a note (median)", f"{lengths['p50']:,.0f}", spread)
    tokens = report.lengths.get("tokens")
    if tokens is not None:
        cut = tokens["share_cut"]
        yield Line(f"notes that are cut, at {tokens['limit']:,} tokens", f"{cut:.1%}", alarming=cut > 0)
    yield Line("empty notes", *_rows(report.empty, report.rows))
    yield Line(f"notes of under {SHORT} words", *_rows(report.short, report.rows))
    yield Line("notes that have their text in common", *_groups(report.duplicates, report.rows))
    near = report.near_duplicates
    if near is None:
        yield Line(
            "notes that are nearly alike", "?", f"not compared: over {NEAR_ROWS:,}; set --data.split.near_threshold"
        )
    else:
        what = f"notes that are nearly alike (Jaccard {report.near_threshold} or more)"
        yield Line(what, *_groups(near, report.rows))
    yield Line("notes whose text has several specialties", *_groups(report.conflicts, report.rows))
    yield Line("best accuracy that these allow", f"{report.accuracy_ceiling:.1%}", "", report.accuracy_ceiling < 1)
    for pair, rows in report.leakage.items():
        earlier, _, later = pair.partition("/")
        nearly = 0 if report.near_leakage is None else report.near_leakage[pair] - rows
        found, _ = _of(rows, report.splits[later])
        more = f"and {nearly:,} that nearly do" if nearly else ""
        yield Line(f"{later} notes whose text stands in {earlier}", found, more, rows + nearly > 0)
    for name, told in report.label_leaks.items():
        yield Line(f"column {name!r} gives the specialty away", f"{told:.1%}", "of its values", alarming=True)


def _of(rows: int, total: int) -> tuple[str, str]:
    """A count, with its share where there is any, and no ids."""
    return (f"{rows:,} ({rows / total:.1%})" if rows else "0"), ""


def _rows(finding: dict[str, Any], total: int) -> tuple[str, str, bool]:
    ids: list[str] = finding["ids"][:5]
    which = ", ".join(ids) + (" ..." if finding["rows"] > len(ids) else "")
    return _of(finding["rows"], total)[0], which, finding["rows"] > 0


def _groups(finding: dict[str, Any], total: int) -> tuple[str, str, bool]:
    groups: list[list[str]] = finding["ids"][:3]
    named = [" = ".join([*ids[:3], *["..."] * (len(ids) > 3)]) for ids in groups]
    which = "; ".join(named) + ("; ..." if finding["groups"] > len(groups) else "")
    count = f"{finding['groups']:,} group{'s' * (finding['groups'] != 1)}: {which}" if finding["groups"] else ""
    return _of(finding["rows"], total)[0], count, finding["rows"] > 0
