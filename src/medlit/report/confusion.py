"""The confusion matrix as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medlit.model.metrics import Scores


def confusion_figure(scores: Scores, title: str) -> Figure:
    """Draw K true x K+1 predicted counts; colour is the share of the true class.

    Args:
        scores: confusion counts with the invalid answers in the last column.
        title: above the picture.
    """
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(scores["confusion"])
    names = list(scores["per_class"])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 0.72 * (len(names) + 1), 2.2 + 0.56 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seaborn.heatmap(
        share,
        annot=np.where(counts > 0, counts.astype(str), ""),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        linewidths=0.5,
        linecolor="#dddddd",
        xticklabels=[*names, "not on the list"],
        yticklabels=[f"{name} ({n})" for name, n in zip(names, counts.sum(axis=1), strict=True)],
        cbar_kws={"label": "share of the true specialty's notes"},
        ax=axes,
    )
    axes.axvline(len(names), color="#555555", linewidth=1.5)
    axes.set(xlabel="answered", ylabel="true (notes)", title=title)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(axis="y", rotation=0)
    return figure
