"""The figures of a report, the model's or of all systems together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from medlit.evaluation import calibration, selective
from medlit.evaluation.intervals import wilson
from medlit.report.confusion import confusion_figure
from medlit.report.style import ACCENT, INK, WARN, colour, sheet
from medlit.report.systems import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medlit.model.metrics import Scores

LENGTH_BINS = 6
# Name -> title and what is seen.
CAPTIONS = {
    "classes": (
        "Score of each specialty",
        "F1 of each specialty, the commonest on top, with its number of test notes. Bars are the first system's.",
    ),
    "confusion": (
        "Who is taken for whom",
        "Rows are true specialties and add up to one; the cells show counts. The last column holds answers that are"
        " not on the list.",
    ),
    "reliability": (
        "Does 80 % mean 80 %?",
        "Notes sorted by confidence, in bins of equally many: the share answered rightly against the mean confidence,"
        " with 95 % intervals. On the diagonal a probability means what it says.",
    ),
    "risk_coverage": (
        "What leaving the doubtful notes to a person would gain",
        "Share of errors among the surest notes, by how large a share of the notes is answered. A system that gives no"
        " probabilities is a point: it answers everything.",
    ),
    "length": (
        "Length against accuracy",
        "Accuracy of notes by the length of their prompt, in bins of equally many, with 95 % intervals.",
    ),
}


def figures(systems: Sequence[System]) -> dict[str, Figure]:
    """Draw what the systems' records allow, by the names of `CAPTIONS`; the first system is the one reported on."""
    first = systems[0]
    title = f"{first.title}: {len(first.answered)} test notes"
    found = {"classes": class_figure(systems), "confusion": confusion_figure(cast("Scores", first.metrics), title)}
    if first.answered.probabilities is not None:
        found["reliability"] = reliability_figure(first)
    if any(system.answered.probabilities is not None for system in systems):
        found["risk_coverage"] = coverage_figure(systems)
    if first.answered.tokens.any():
        found["length"] = length_figure(first)
    return found


def class_figure(systems: Sequence[System]) -> Figure:
    """F1 of each specialty: bars for the first system, a mark for each other one."""
    first, *others = systems
    classes = sorted(first.metrics["per_class"].items(), key=lambda item: item[1]["support"])
    names = [name for name, _ in classes]
    figure, axes = sheet(8.6, 1.4 + 0.36 * len(names))
    places = range(len(names))
    values = np.array([scores["f1"] for _, scores in classes])
    axes.barh(places, values, height=0.62, color=colour(first.name), label=first.title)
    for place, value in zip(places, values, strict=True):
        axes.text(1.03, place, f"{value:.2f}", va="center", fontsize=9, color=colour(first.name))
    for i, system in enumerate(others):
        marks = [system.metrics["per_class"][name]["f1"] for name in names]
        axes.scatter(marks, places, s=38, color=colour(system.name, i), edgecolor="white", label=system.title, zorder=3)
    axes.set_yticks(places, [f"{name} ({scores['support']})" for name, scores in classes])
    axes.set(xlim=(0, 1.02), xlabel="F1", ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def reliability_figure(system: System) -> Figure:
    """Accuracy against confidence in bins of equal mass."""
    answered, confidence = system.answered, system.answered.confidence
    assert confidence is not None
    bins = calibration.reliability(confidence, answered.correct)
    ranges = [wilson(round(share * n), int(n)) for share, n in zip(bins.accuracy, bins.notes, strict=True)]
    low, high = np.array(ranges).T
    figure, axes = sheet(5.4, 4.8)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.vlines(bins.confidence, low, high, color=colour(system.name), linewidth=1.4, alpha=0.6)
    axes.plot(bins.confidence, bins.accuracy, "o-", color=colour(system.name), markeredgecolor="white", markersize=8)
    # Where the notes are: a tick for each along the axis.
    axes.plot(confidence, np.full(len(confidence), -0.02), "|", color=INK, alpha=0.25, markersize=7, clip_on=False)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="confidence (each note is a stroke)", aspect="equal")
    axes.set(ylabel="answered rightly", title=f"expected calibration error {bins.error:.3f}")
    axes.title.set_fontsize(10)
    return figure


def coverage_figure(systems: Sequence[System]) -> Figure:
    """Risk against selective, a line for each system with probabilities and a point for each without."""
    figure, axes = sheet(6.4, 4.6)
    # Room for the first system and twice its errors: a system that is wrong most of the time would flatten all others.
    top = min(1.0, 2 * float(1 - systems[0].answered.correct.mean()) + 0.05)
    for i, system in enumerate(systems):
        correct, confidence = system.answered.correct, system.answered.confidence
        paint = colour(system.name, i)
        if confidence is None:
            wrong = 1 - correct.mean()
            title = f"{system.title}, {wrong:.0%} wrong" + (" (higher up)" if wrong > top else "")
            axes.plot([1], [wrong], "D", color=paint, label=title, clip_on=wrong > top, zorder=3)
        else:
            risk = selective.risks(confidence, correct)
            share = np.arange(1, len(risk) + 1) / len(risk)
            title = f"{system.title}, area {risk.mean():.3f}"
            axes.plot(share, risk, color=paint, linewidth=2, label=title, drawstyle="steps-pre")
    axes.set(xlim=(0, 1.005), ylim=(0, top), xlabel="share of the notes that is answered")
    axes.set(ylabel="share of these answered wrongly")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def length_figure(system: System) -> Figure:
    """Accuracy by length, and whether notes were cut."""
    answered = system.answered
    order = np.argsort(answered.tokens, kind="stable")
    parts = [part for part in np.array_split(order, LENGTH_BINS) if len(part)]
    right = [int(answered.correct[part].sum()) for part in parts]
    share = np.array([n / len(part) for n, part in zip(right, parts, strict=True)])
    low, high = np.array([wilson(n, len(part)) for n, part in zip(right, parts, strict=True)]).T
    figure, axes = sheet(7.2, 3.6)
    places = np.arange(len(parts))
    axes.bar(places, share, color=ACCENT, alpha=0.25, width=0.72)
    axes.errorbar(places, share, [share - low, high - share], fmt="o", color=ACCENT, capsize=4, linewidth=1.6)
    overall = answered.correct.mean()
    axes.axhline(overall, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(len(parts) - 0.4, overall, f" all {overall:.0%}", va="center", fontsize=9, color=INK, clip_on=False)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    ticks = []
    for part in parts:
        tokens, cut = answered.tokens[part], int((answered.cut_tokens[part] > 0).sum())
        ticks.append(f"{tokens.min():,}-{tokens.max():,}\n{len(part)} notes" + (f"\n{cut} cut" if cut else ""))
    axes.set_xticks(places, ticks)
    for place, part in zip(places, parts, strict=True):
        if (answered.cut_tokens[part] > 0).any():
            axes.get_xticklabels()[place].set_color(WARN)
    axes.set(ylim=(0, 1.02), xlabel="tokens of the prompt", ylabel="answered rightly")
    axes.grid(axis="x", visible=False)
    return figure
