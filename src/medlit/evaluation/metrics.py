"""The table of metrics: every place that names, logs, prints or compares one reads it here.

METRICS holds one row for each single number of `<stage>_metrics.json`. From it follow

- LOGGED: names of the metrics that the module logs as `val/<name>` and `test/<name>`;
- MONITORS: tag -> "min" or "max", what `checkpoint.monitor` and `early_stopping.monitor` accept, with the mode to use;
- HYPERPARAMETERS: names of the logged metrics that TensorBoard shows beside the hyperparameters of a run;
- REPORTED, TERMINAL: the columns of the report's table of systems, and those of them that fit a terminal;
- METRIC: name -> its row.

`metric.value(metrics)` and `metric.interval(metrics)` format what the JSON holds. A value that is null (a system
without probabilities) or absent (written by an older version) becomes EMPTY.

To add a metric: add a row here and compute it in `model/metrics.py` (from counts, if it is logged) or in
`evaluation/uncertainty.py` (from the results, note by note).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

EMPTY = "–"  # noqa: RUF001 - an empty cell


def percent(value: float | None) -> str:
    """Format a share, such as 81.3%."""
    return EMPTY if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """Format a score, such as 0.813."""
    return EMPTY if value is None else f"{value:.3f}"


def span(interval: Sequence[float], form: Callable[[float], str]) -> str:
    """Format an interval, such as 78.0 to 84.2%."""
    low, high = interval
    return f"{form(low).removesuffix('%')} to {form(high)}"


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        name: key in `<stage>_metrics.json` and second half of its tag `stage/name`.
        title: column heading.
        form: formats a value.
        mode: "max" if higher is better, else "min"; as in Lightning's ModelCheckpoint.
        interval_key: key of its 95 % interval in the same file; None if it has none.
        logged: computed from counts in every validation, so it can be logged and monitored.
        hyperparameter: shown beside a run's hyperparameters.
        reported: a column of the report's table of systems.
        terminal: a column of the table in the terminal, which has room for three.
    """

    name: str
    title: str
    form: Callable[[float | None], str] = number
    mode: Literal["min", "max"] = "max"
    interval_key: str | None = None
    logged: bool = False
    hyperparameter: bool = False
    reported: bool = False
    terminal: bool = False

    def value(self, metrics: Mapping[str, Any]) -> str:
        """Format this metric's value."""
        return self.form(metrics.get(self.name))

    def interval(self, metrics: Mapping[str, Any]) -> str:
        """Format this metric's 95 % interval; empty if there is none."""
        ends = None if self.interval_key is None else metrics.get(self.interval_key)
        return "" if ends is None else span(ends, self.form)


METRICS = (
    Metric("loss", "loss", mode="min", logged=True),
    Metric(
        "accuracy",
        "accuracy",
        percent,
        interval_key="accuracy_ci",
        logged=True,
        hyperparameter=True,
        reported=True,
        terminal=True,
    ),
    Metric(
        "f1_macro",
        "macro F1",
        interval_key="f1_macro_ci",
        logged=True,
        hyperparameter=True,
        reported=True,
        terminal=True,
    ),
    Metric("f1_weighted", "weighted F1", logged=True),
    Metric("invalid_rate", "invalid", percent, mode="min", logged=True, reported=True, terminal=True),
    Metric("top3_accuracy", "top-3 accuracy", percent, reported=True),
    Metric("log_loss", "log loss", mode="min", reported=True),
    Metric("brier", "Brier score", mode="min"),
    Metric("ece", "ECE", mode="min", reported=True),
    Metric("aurc", "AURC", mode="min", reported=True),
    Metric("accuracy_at_80", "accuracy at 80 % coverage", percent),
    Metric("accuracy_at_90", "accuracy at 90 % coverage", percent),
)

METRIC = {metric.name: metric for metric in METRICS}
LOGGED = tuple(metric.name for metric in METRICS if metric.logged)
MONITORS: dict[str, Literal["min", "max"]] = {f"val/{m.name}": m.mode for m in METRICS if m.logged}
HYPERPARAMETERS = tuple(metric.name for metric in METRICS if metric.hyperparameter)
REPORTED = tuple(metric for metric in METRICS if metric.reported)
TERMINAL = tuple(metric for metric in METRICS if metric.terminal)
