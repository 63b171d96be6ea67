"""How the figures look: one sheet of paper, one colour a system."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, ACCENT, WARN = "#1f2933", "#e3e8ee", "#1f5f8b", "#c1442e"
_COLOURS = {"test": ACCENT, "head": "#5b8c3e", "tfidf": "#e08a2e", "zero_shot": "#8662a8", "majority": "#8a949e"}
_OTHERS = ("#2a9d8f", "#b5838d", "#6d6875")


def colour(name: str, place: int = 0) -> str:
    """A system's colour; one without a colour of its own gets one by its place."""
    return _COLOURS.get(name, _OTHERS[place % len(_OTHERS)])


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches, that no window will ever hold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9)
    return figure, axes
