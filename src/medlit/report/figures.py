"""The figures of a report: of the first system, or of all systems together."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medlit.errors import best_effort
from medlit.evaluation import calibration
from medlit.evaluation.intervals import wilson
from medlit.evaluation.results import Results
from medlit.report.systems import System

MOST_LABELS, MOST_CONFUSED = 60, 30  # of a figure: with 500 a confusion matrix takes over 20 GB
_MOST_CHARACTERS = 40  # of a label
INK, GRID, ACCENT, WARN = "#1f2933", "#e3e8ee", "#1f5f8b", "#c1442e"
_COLOURS = {"test": ACCENT, "tfidf": "#e08a2e", "zero_shot": "#8662a8", "majority": "#3d4650"}
_OTHER_COLOURS = ("#2a9d8f", "#b5838d", "#6d6875")


def figures(systems: Sequence[System]) -> dict[str, Figure]:
    """Draw the figures that the systems' results allow, by name; the first system is the one reported on."""
    first, scored = systems[0], [one for one in systems if one.results.probabilities is not None]
    possible: dict[str, tuple[object, Callable[[], Figure]]] = {
        "classes": (first.metrics.get("per_class"), lambda: class_figure(systems)),
        "confusion": (True, lambda: confusion_figure(first.results, f"{first.title}: {len(first.results)} test notes")),
        "reliability": (first.results.probabilities is not None, lambda: reliability_figure(first)),
        "risk_coverage": (scored, lambda: risk_coverage_figure(systems)),
        "length": (first.results.tokens.any(), lambda: length_figure(first)),
        "sets": (first.metrics.get("sets"), lambda: sets_figure(first)),
    }
    drawn = {}
    for name in (name for name, (is_possible, _) in possible.items() if is_possible):
        with best_effort(f"the report's figure {name!r}"):
            drawn[name] = possible[name][1]()
    return drawn


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A drawn figure as an image, (height, width, 3); drawing takes most of a small validation's time."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def confusion_figure(results: Results, title: str) -> Figure:
    """Draw true x predicted counts, the last column invalid answers; colour is the share of the true class.

    Of more than 60 labels it shows those of the most frequent errors; answers with one of the others have one column.
    """
    k, (true, answer, _) = len(results.names), results.errors
    frequent = np.argsort(-np.bincount(results.truth, minlength=k), kind="stable")
    first = np.unique([*np.stack([true, answer], axis=1).ravel(), *frequent], return_index=True)[1]
    shown = np.sort(np.argsort(first, kind="stable")[: k if k <= MOST_LABELS else MOST_CONFUSED])
    names = [short(results.names[label]) for label in shown]
    columns = [*names, "invalid"] if len(shown) == k else [*names, "others", "invalid"]
    if len(shown) < k:
        title += f"\nthe {len(shown)} most confused of {k:,} specialties"
    place = np.full(k + 1, len(shown))  # of an answer
    place[shown], place[k] = np.arange(len(shown)), len(columns) - 1
    counts = np.zeros((len(shown), len(columns)), dtype=np.int64)
    rows = np.isin(results.truth, shown)
    np.add.at(counts, (place[results.truth[rows]], place[results.answer[rows]]), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 0.72 if len(names) <= 20 else 0.4  # inches
    figure, axes = _axes(2.5 + size * len(columns), 2.2 + 0.78 * size * len(names))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    mesh = axes.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolors="#dddddd", linewidth=0.5)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90)
    notes = zip(names, counts.sum(axis=1), strict=True)
    axes.set_yticks(np.arange(len(names)) + 0.5, [f"{name} ({n})" for name, n in notes])
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, fraction=0.6 / size / len(columns), aspect=30)
    bar.set_label("share of the true specialty's notes")
    bar.outline.set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):  # an empty text in each other cell would take a minute
        colour = "white" if share[row, column] > 0.5 else INK
        number = str(counts[row, column])
        axes.text(column + 0.5, row + 0.5, number, ha="center", va="center", color=colour, in_layout=False)
    axes.axvline(len(names), color="#555555", linewidth=1.5)
    axes.set(xlabel="predicted", ylabel="true (notes)", title=title)
    return figure


def class_figure(systems: Sequence[System]) -> Figure:
    """F1 of the most frequent specialties: bars for the first system, a mark for each other one."""
    first, *others = systems
    everything = sorted(first.metrics["per_class"].items(), key=lambda item: -item[1]["support"])[::-1]  # from below
    classes = everything[-MOST_LABELS:]
    figure, axes = _axes(8.6, 1.4 + 0.36 * len(classes))
    if len(classes) < len(everything):
        axes.set_title(f"the {len(classes)} most frequent of {len(everything):,} specialties", fontsize=10)
    places = range(len(classes))
    values = [scores["f1"] for _, scores in classes]
    axes.barh(places, values, height=0.62, color=_colour(first.name), label=first.title)
    for place, value in zip(places, values, strict=True):
        axes.text(1.03, place, f"{value:.2f}", va="center", fontsize=9, color=_colour(first.name))
    for i, system in enumerate(others):
        marks = [system.metrics.get("per_class", {}).get(name, {}).get("f1", np.nan) for name, _ in classes]
        heights = np.array(places) + min(0.24, 0.8 / len(others)) * ((len(others) - 1) / 2 - i)  # none hides another
        dots = axes.scatter(marks, heights, s=34, color=_colour(system.name, i), edgecolor="white", label=system.title)
        dots.set(zorder=3, clip_on=False)
    axes.set_yticks(places, [f"{short(name)} ({scores['support']})" for name, scores in classes])
    axes.set(xlim=(0, 1.02), xlabel="F1", ylim=(-0.6, len(classes) - 0.4))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def reliability_figure(system: System) -> Figure:
    """Accuracy against confidence in bins of equal mass."""
    results, confidence = system.results, system.results.confidence
    assert confidence is not None
    bins = calibration.reliability(confidence, results.correct)
    intervals = [wilson(round(share * n), int(n)) for share, n in zip(bins.accuracy, bins.notes, strict=True)]
    low, high = np.array(intervals).T
    colour = _colour(system.name)
    figure, axes = _axes(5.4, 4.8)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.vlines(bins.confidence, low, high, color=colour, linewidth=1.4, alpha=0.6)
    axes.plot(bins.confidence, bins.accuracy, "o-", color=colour, markeredgecolor="white", markersize=8)
    axes.plot(confidence, np.full(len(confidence), -0.02), "|", color=INK, alpha=0.25, markersize=7, clip_on=False)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel="confidence (one stroke per note)", ylabel="accuracy")
    axes.set_title(f"expected calibration error {bins.error:.3f}", fontsize=10)
    return figure


def risk_coverage_figure(systems: Sequence[System]) -> Figure:
    """Risk against coverage: a line for each system with probabilities and a point for each without."""
    figure, axes = _axes(6.4, 4.6)
    # Room for the first system and twice its errors; a very poor system would flatten all others.
    top = min(1.0, 2 * float(1 - systems[0].results.correct.mean()) + 0.05)
    for i, system in enumerate(systems):
        correct, confidence = system.results.correct, system.results.confidence
        colour = _colour(system.name, i)
        if confidence is None:
            wrong = 1 - correct.mean()
            label = f"{system.title}, {wrong:.0%} errors" + (" (above the axis)" if wrong > top else "")
            axes.plot([1], [wrong], "D", color=colour, label=label, clip_on=wrong > top, zorder=3)
        else:
            risk = calibration.risks(confidence, correct)
            coverage = np.arange(1, len(risk) + 1) / len(risk)
            label = f"{system.title}, AURC {risk.mean():.3f}" + (" (above the axis)" if risk.min() > top else "")
            axes.plot(coverage, risk, color=colour, linewidth=2, label=label, drawstyle="steps-pre")
    axes.set(xlim=(0, 1.005), ylim=(0, top), xlabel="coverage (share of notes answered)")
    axes.set(ylabel="risk (share of errors among them)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def length_figure(system: System) -> Figure:
    """Accuracy by prompt length, and the number of truncated notes."""
    results = system.results
    bins = results.by_length
    share = np.array([results.correct[part].mean() for part in bins])
    low, high = np.array([wilson(int(results.correct[part].sum()), len(part)) for part in bins]).T
    figure, axes = _axes(7.2, 3.6)
    places = np.arange(len(bins))
    axes.bar(places, share, color=ACCENT, alpha=0.25, width=0.72)
    axes.errorbar(places, share, [share - low, high - share], fmt="o", color=ACCENT, capsize=4, linewidth=1.6)
    overall = results.correct.mean()
    axes.axhline(overall, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(len(bins) - 0.4, overall, f" all {overall:.0%}", va="center", fontsize=9, color=INK, clip_on=False)
    truncated = [int((results.cut_tokens[part] > 0).sum()) for part in bins]
    ticks = []
    for part, n in zip(bins, truncated, strict=True):
        ends = "-".join(f"{tokens:,}" for tokens in np.unique(results.tokens[part[[0, -1]]]))
        ticks.append(f"{ends}\n{len(part)} notes" + (f"\n{n} truncated" if n else ""))
    axes.set_xticks(places, ticks)
    for label, n in zip(axes.get_xticklabels(), truncated, strict=True):
        if n:
            label.set_color(WARN)
    axes.set(xlim=(-0.6, len(bins) - 0.4), ylim=(0, 1.02), xlabel="tokens of the prompt", ylabel="accuracy")
    axes.grid(axis="x", visible=False)
    return figure


def sets_figure(system: System) -> Figure:
    """Coverage reached, and mean size of a set, against the requested coverage."""
    requested, reached, sizes = np.array(system.metrics["sets"]["by_coverage"]).T
    figure, axes = _axes(6.4, 4.6)
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(requested, reached, "o-", color=ACCENT, markeredgecolor="white", label="coverage reached (left)")
    axes.set(xlim=(0.5, 1.005), ylim=(0, 1.005), xlabel="requested coverage", ylabel="coverage reached")
    size = axes.twinx()
    size.plot(requested, sizes, "s-", color=WARN, markeredgecolor="white", label="mean size of a set (right)")
    size.set(ylim=(0, None), ylabel="labels")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def short(name: str) -> str:
    """A label as the figures write it: not much longer than its cell, and never as a formula."""
    cut = name if len(name) <= _MOST_CHARACTERS else f"{name[: _MOST_CHARACTERS // 2]}…{name[-_MOST_CHARACTERS // 2 :]}"
    return cut.replace("$", r"\$")


def _colour(name: str, position: int = 0) -> str:
    return _COLOURS.get(name, _OTHER_COLOURS[position % len(_OTHER_COLOURS)])


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure without a window, in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # otherwise each text's size is measured on a new canvas
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9)
    return figure, axes
