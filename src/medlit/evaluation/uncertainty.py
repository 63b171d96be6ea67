"""Every number of a set of answers that goes beyond counting them."""

from __future__ import annotations

from typing import TypedDict

from medlit.evaluation import calibration, selective
from medlit.evaluation.intervals import Interval, Resamples, interval, wilson
from medlit.evaluation.results import Results


class Doubt(TypedDict):
    """What `<verb>_metrics.json` says of how sure one may be; null where a system gives no probabilities.

    accuracy_ci: Wilson's 95 % interval, notes taken as independent. accuracy_ci_bootstrap, f1_macro_ci: 95 % bootstrap
    over texts. top3_accuracy: share whose truth is among the three likeliest labels. log_loss: nats. brier: 0 to 2.
    ece: expected calibration error in bins of equal mass. temperature: of a validation the one that fits it, of a test
    the one that its probabilities were divided by, null for none. aurc: mean risk over coverages. accuracy_at_80,
    accuracy_at_90: on the surest 80 and 90 % of the notes. risk_coverage: (selective, risk) at 20 places.
    """

    accuracy_ci: Interval
    accuracy_ci_bootstrap: Interval
    f1_macro_ci: Interval
    top3_accuracy: float | None
    log_loss: float | None
    brier: float | None
    ece: float | None
    temperature: float | None
    aurc: float | None
    accuracy_at_80: float | None
    accuracy_at_90: float | None
    risk_coverage: list[tuple[float, float]] | None


def doubt(answered: Results, temperature: float | None = None) -> Doubt:
    """Intervals, and what the probabilities are worth.

    Args:
        answered: at least one note.
        temperature: to be told along; nothing is divided by it here.
    """
    correct = answered.correct
    drawn = Resamples(answered.truth, answered.answer[None], answered.groups, len(answered.names))
    found = Doubt(
        accuracy_ci=wilson(int(correct.sum()), len(answered)),
        accuracy_ci_bootstrap=interval(drawn.accuracy[0]),
        f1_macro_ci=interval(drawn.f1_macro[0]),
        top3_accuracy=None,
        log_loss=None,
        brier=None,
        ece=None,
        temperature=temperature,
        aurc=None,
        accuracy_at_80=None,
        accuracy_at_90=None,
        risk_coverage=None,
    )
    confidence = answered.confidence
    if answered.probabilities is not None and confidence is not None:
        found["top3_accuracy"] = calibration.top_accuracy(answered.probabilities, answered.truth)
        found["log_loss"] = calibration.log_loss(answered.probabilities, answered.truth)
        found["brier"] = calibration.brier(answered.probabilities, answered.truth)
        found["ece"] = calibration.reliability(confidence, correct).error
        found["aurc"] = selective.aurc(confidence, correct)
        found["accuracy_at_80"] = selective.accuracy_at(0.8, confidence, correct)
        found["accuracy_at_90"] = selective.accuracy_at(0.9, confidence, correct)
        found["risk_coverage"] = selective.curve(confidence, correct)
    return found
