"""An audit as a table in the terminal, and as a figure of class balance and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from medlit.data.audit import NEAR_ROWS, SHORT, Audit, AuditReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = 40
_COLOURS = {"train": "#3b6ea5", "validation": "#e0a458", "test": "#7fb685", "all": "#3b6ea5"}

# A line of the table: what was counted; a count, share or length; ids or details; whether it is a warning.
_Line = tuple[str, str, str, bool]


def print_report(report: AuditReport) -> None:
    """Print counts, shares and the first row ids of every finding, and the notes of each specialty."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"medlit audit: {escape(report.source)}", title_justify="left")
    table.add_column("finding", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("details", overflow="fold")
    for name, value, details, warning in _lines(report):
        table.add_row(escape(name), value, escape(details), style="yellow" if warning else "")
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


def _lines(report: AuditReport) -> Iterator[_Line]:
    splits = ", ".join(f"{name} {rows:,}" for name, rows in report.splits.items())
    yield "notes", f"{report.rows:,}", splits if len(report.splits) > 1 else "one table without splits", False
    yield "specialties", f"{len(report.classes):,}", "", False
    yield "notes without a specialty", _share(report.unlabelled, report.rows), "", report.unlabelled > 0
    for unit, lengths in report.lengths.items():
        spread = ", ".join(f"{name} {lengths[name]:,.0f}" for name in ("mean", "p95", "max"))
        yield f"{unit} per note (median)", f"{lengths['p50']:,.0f}", spread, False
    if "tokens" in report.lengths:
        limit, cut = report.lengths["tokens"]["limit"], report.lengths["tokens"]["share_cut"]
        yield f"notes that are cut, at {limit:,} tokens", f"{cut:.1%}", "", cut > 0
    yield _rows_line("empty notes", report.empty, report.rows)
    yield _rows_line(f"notes of under {SHORT} words", report.short, report.rows)
    yield _groups_line("notes with identical texts", report.duplicates, report.rows)
    if report.near_duplicates is None:
        yield "near duplicates", "?", f"not searched for: over {NEAR_ROWS:,}; set --data.split.near_threshold", False
    else:
        name = f"near duplicates (Jaccard similarity of {report.near_threshold} or more)"
        yield _groups_line(name, report.near_duplicates, report.rows)
    yield _groups_line("notes whose text has several specialties", report.conflicts, report.rows)
    yield "highest possible accuracy", f"{report.accuracy_ceiling:.1%}", "", report.accuracy_ceiling < 1
    for pair, rows in report.leakage.items():
        earlier, _, later = pair.partition("/")
        similar = 0 if report.near_leakage is None else report.near_leakage[pair] - rows
        details = f"and {similar:,} near duplicates" if similar else ""
        yield (
            f"{later} notes whose text is also in {earlier}",
            _share(rows, report.splits[later]),
            details,
            (rows + similar > 0),
        )
    for name, share in report.label_leaks.items():
        yield f"column {name!r} gives the specialty away", f"{share:.1%}", "of its values", True


def _share(rows: int, total: int) -> str:
    return f"{rows:,} ({rows / total:.1%})" if rows else "0"


def _rows_line(name: str, finding: dict[str, Any], total: int) -> _Line:
    ids: list[str] = finding["ids"][:5]
    details = ", ".join(ids) + (" ..." if finding["rows"] > len(ids) else "")
    return name, _share(finding["rows"], total), details, finding["rows"] > 0


def _groups_line(name: str, finding: dict[str, Any], total: int) -> _Line:
    number, groups = finding["groups"], finding["ids"][:3]
    listed = [" = ".join([*ids[:3], *["..."] * (len(ids) > 3)]) for ids in groups]
    listed += ["..."] * (number > len(groups))
    details = f"{number:,} group{'s' * (number != 1)}: {'; '.join(listed)}" if number else ""
    return name, _share(finding["rows"], total), details, finding["rows"] > 0


def audit_figure(audit: Audit) -> Figure:
    """Draw the class balance, stacked by split, beside the distribution of lengths with the limit, if there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = max(4.0, 1.6 + 0.3 * len(audit.report.classes))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    balance, lengths = figure.subplots(1, 2)
    figure.suptitle(audit.report.source, fontsize=11, color="#555555", parse_math=False)
    _draw_balance(balance, audit.report)
    _draw_lengths(lengths, audit)
    for axis in (balance.xaxis, lengths.xaxis, lengths.yaxis):  # counts: no fractions
        axis.set_major_locator(MaxNLocator(integer=True))
    for axes in (balance, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_balance(axes: Axes, report: AuditReport) -> None:
    names = list(report.classes)[::-1]  # the most frequent on top
    left = np.zeros(len(names))
    for split, counts in report.classes_by_split.items():
        notes = np.array([counts.get(name, 0) for name in names])
        axes.barh(names, notes, left=left, color=_COLOURS[split], label=split)
        left += notes
    for place, name in enumerate(names):
        axes.text(left[place], place, f" {report.classes[name]:,}", va="center", fontsize=9)
    axes.margins(x=0.12, y=0.01)
    axes.set(xlabel="notes", title=f"{report.rows:,} notes, {len(names)} specialties")
    if len(report.splits) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def _draw_lengths(axes: Axes, audit: Audit) -> None:
    unit = "tokens" if "tokens" in audit.lengths else "words"
    lengths, summary = audit.lengths[unit], audit.report.lengths[unit]
    # One note of 100,000 tokens would press all others into a single bar: the last bar holds all longer notes.
    end = max(1.0, min(summary["max"], 1.5 * summary["p99"]))
    limit = summary.get("limit")
    width = -(-end // _BARS)  # an integer: bars of 2.5 would hold two lengths or three in turn, and look like a pattern
    bars = np.arange(0, end + width, width)
    axes.hist(np.minimum(lengths, bars[-1]), bins=bars.tolist(), color="#9db8d2", edgecolor="white", linewidth=0.5)
    marks = [("median", summary["p50"], "--", "#1d3557"), ("p95", summary["p95"], ":", "#1d3557")]
    title = f"{unit} per note"
    if limit is not None:
        title += f": {summary['share_cut']:.1%} over the limit of {limit:,.0f}"
        if limit <= 2 * end:
            marks.append(("limit", limit, "-", "#c1121f"))
    for name, value, style, colour in marks:
        axes.axvline(value, color=colour, linewidth=1.5, linestyle=style, label=f"{name} {value:,.0f}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    longer = "" if end == summary["max"] else "; the last bar: all longer notes"
    axes.set(xlim=(0, None), xlabel=f"{unit} (longest {summary['max']:,.0f}{longer})", ylabel="notes", title=title)
