"""An audit as a picture: how many notes each specialty has, and how long notes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medlit.data.audit import Audit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = 40
_COLOURS = {"train": "#3b6ea5", "validation": "#e0a458", "test": "#7fb685", "all": "#3b6ea5"}


def audit_figure(audit: Audit) -> Figure:
    """Draw class balance, stacked by split, beside the distribution of lengths with the limit, if there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = max(4.0, 1.6 + 0.3 * len(audit.report.classes))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    balance, lengths = figure.subplots(1, 2)
    figure.suptitle(audit.report.source, fontsize=11, color="#555555", parse_math=False)
    _draw_balance(balance, audit)
    _draw_lengths(lengths, audit)
    for axis in (balance.xaxis, lengths.xaxis, lengths.yaxis):  # there is no half note
        axis.set_major_locator(MaxNLocator(integer=True))
    for axes in (balance, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_balance(axes: Axes, audit: Audit) -> None:
    report = audit.report
    names = list(report.classes)[::-1]  # the commonest on top
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
    # One note of 100,000 tokens would press all others into a single bar: the last bar holds whatever is longer.
    end = max(1.0, min(summary["max"], 1.5 * summary["p99"]))
    limit = summary.get("limit")
    width = -(-end // _BARS)  # whole: between 2.5 and 5 there are two lengths or three, which would look like a pattern
    bars = np.arange(0, end + width, width)
    axes.hist(np.minimum(lengths, bars[-1]), bins=bars.tolist(), color="#9db8d2", edgecolor="white", linewidth=0.5)
    marks = [("median", summary["p50"], "--", "#1d3557"), ("p95", summary["p95"], ":", "#1d3557")]
    title = f"{unit} a note"
    if limit is not None:
        title += f": {summary['share_cut']:.1%} over the limit of {limit:,.0f}"
        if limit <= 2 * end:
            marks.append(("limit", limit, "-", "#c1121f"))
    for name, value, style, colour in marks:
        axes.axvline(value, color=colour, linewidth=1.5, linestyle=style, label=f"{name} {value:,.0f}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    longer = "" if end == summary["max"] else "; the last bar: all that are longer"
    axes.set(xlim=(0, None), xlabel=f"{unit} (longest {summary['max']:,.0f}{longer})", ylabel="notes", title=title)
