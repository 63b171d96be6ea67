"""The table of metrics: every place that names, logs, prints or compares one reads it here.

METRICS holds one row for each single number of `<stage>_metrics.json`, and all other tables follow from it. A value
that is null (a system without probabilities) or absent (written by an older version) becomes EMPTY. CONTRIBUTING.md
says how to add a metric.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medlit.evaluation import calibration
from medlit.evaluation.intervals import Resamples, percentile_interval, wilson
from medlit.evaluation.results import Results

EMPTY = "–"  # noqa: RUF001 - an empty cell


def percent(value: float | None) -> str:
    """Format a share, such as 81.3%."""
    return EMPTY if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """Format a score, such as 0.813."""
    return EMPTY if value is None else f"{value:.3f}"


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation."""

    name: str  # key in `<stage>_metrics.json`, where `<name>_ci` is its 95 % interval, and half of its tag `stage/name`
    title: str  # column heading
    form: Callable[[float | None], str] = number  # formats a value
    mode: Literal["min", "max"] = "max"  # "max" if higher is better, else "min"; as in Lightning's ModelCheckpoint
    logged: bool = False  # computed from counts in every validation, so it can be logged and monitored
    shown: Literal["headline", "report"] | None = None  # "headline", "report" or, if it is in the file only, None

    def value(self, metrics: Mapping[str, Any]) -> str:
        """Format this metric's value."""
        return self.form(metrics.get(self.name))

    def interval(self, metrics: Mapping[str, Any]) -> str:
        """Format this metric's 95 % interval, such as 78.0 to 84.2%; empty if there is none."""
        ends = metrics.get(f"{self.name}_ci")
        return "" if ends is None else f"{self.form(ends[0]).removesuffix('%')} to {self.form(ends[1])}"


METRICS = (
    Metric("loss", "loss", mode="min", logged=True),
    Metric("accuracy", "accuracy", percent, logged=True, shown="headline"),
    Metric("any_of_accuracy", "any-of accuracy", percent, logged=True, shown="headline"),
    Metric("balanced_accuracy", "balanced accuracy", percent, logged=True, shown="report"),
    Metric("f1_macro", "macro F1", logged=True, shown="headline"),
    Metric("f1_weighted", "weighted F1", logged=True),
    Metric("invalid_rate", "invalid", percent, mode="min", logged=True, shown="headline"),
    Metric("top3_accuracy", "top-3 accuracy", percent, shown="report"),
    Metric("log_loss", "log loss", mode="min", shown="report"),
    Metric("brier", "Brier score", mode="min"),
    Metric("ece", "ECE", mode="min", shown="report"),
    Metric("aurc", "AURC", mode="min", shown="report"),
    Metric("accuracy_at_80", "accuracy at 80% coverage", percent),
    Metric("accuracy_at_90", "accuracy at 90% coverage", percent),
)

METRIC = {metric.name: metric for metric in METRICS}
LOGGED = tuple(metric.name for metric in METRICS if metric.logged)  # as `val/<name>` and `test/<name>`
# What `checkpoint.monitor` and `early_stopping.monitor` accept, with the mode to use.
MONITORS: dict[str, Literal["min", "max"]] = {f"val/{metric.name}": metric.mode for metric in METRICS if metric.logged}
HEADLINE = tuple(metric for metric in METRICS if metric.shown == "headline")  # on terminals and model cards
HYPERPARAMETERS = ("accuracy", "any_of_accuracy", "f1_macro")  # in TensorBoard, beside the hyperparameters of a run
REPORTED = HEADLINE + tuple(metric for metric in METRICS if metric.shown == "report")  # columns of the table of systems


def applicable(metrics: Sequence[Metric], values: Mapping[str, Any]) -> list[Metric]:
    """The metrics to show of an evaluation: without the any-of accuracy where every note has one label."""
    return [metric for metric in metrics if metric.name != "any_of_accuracy" or values.get("several_labels")]


def uncertainty(results: Results, temperature: float | None = None) -> dict[str, Any]:
    """Compute what `<stage>_metrics.json` holds beyond counts, of at least one note; `temperature` as it is given.

    accuracy_ci, any_of_accuracy_ci: Wilson's 95 % interval, notes taken as independent. accuracy_ci_bootstrap,
    f1_macro_ci: 95 % bootstrap over texts. The others are null if the system gives no probabilities. top3_accuracy:
    share of notes whose true label is among the three most probable. log_loss: nats. brier: 0 to 2. ece: expected
    calibration error in bins of equal mass. aurc: area under the risk-coverage curve. accuracy_at_80, accuracy_at_90:
    on the most confident 80 and 90 % of the notes.
    """
    correct, probabilities, confidence = results.correct, results.probabilities, results.confidence
    resamples = Resamples(results.truth, results.answer[None], results.groups, len(results.names))
    metrics: dict[str, Any] = {
        "accuracy_ci": wilson(int(correct.sum()), len(results)),
        "any_of_accuracy_ci": wilson(int(results.any_of.sum()), len(results)),
        "accuracy_ci_bootstrap": percentile_interval(resamples.accuracy[0]),
        "f1_macro_ci": percentile_interval(resamples.f1_macro[0]),
        "temperature": temperature,
        **dict.fromkeys(("top3_accuracy", "log_loss", "brier", "ece", "aurc", "accuracy_at_80", "accuracy_at_90")),
    }
    if probabilities is not None and confidence is not None:
        risk = calibration.risks(confidence, correct)
        metrics |= {
            "top3_accuracy": calibration.top_accuracy(probabilities, results.truth),
            "log_loss": calibration.log_loss(probabilities, results.truth),
            "brier": calibration.brier(probabilities, results.truth),
            "ece": calibration.reliability(confidence, correct).error,
            "aurc": float(risk.mean()),
            **{f"accuracy_at_{n}": float(1 - risk[max(1, round(n / 100 * len(risk))) - 1]) for n in (80, 90)},
        }
    return metrics
