"""What a report says, as plain values that both templates lay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medlit.evaluation.compare import compare
from medlit.evaluation.results import Results
from medlit.report.systems import System

PAIRS = 10
NONE = "–"  # noqa: RUF001 - a dash for what a system does not have


def content(systems: Sequence[System], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every table and sentence.

    Args:
        systems: the one reported on first.
        facts: what the test wrote down of its data, its versions and its weights; may be empty.
    """
    first, *others = systems
    return {
        "system": first.title,
        "notes": len(first.answered),
        "classes": len(first.answered.names),
        "headline": _headline(first.metrics),
        "columns": ["accuracy", "macro F1", "off the list", "top 3", "log-loss", "ECE", "AURC"],
        "systems": [(system.title, _row(system.metrics)) for system in systems],
        "sentences": [compare(first.answered, other.answered).words(other.title) for other in others],
        "selective": _selective(first.metrics),
        "class_rows": _class_rows(first.metrics),
        "pairs": confused_pairs(first.answered),
        "beside_pairs": beside_pairs(first.answered),
        "data": _data_rows(facts.get("data", {})),
        "split_classes": facts.get("data", {}).get("classes", {}),
        "run": _run_rows(facts),
        "versions": list(facts.get("versions", {}).items()),
    }


def _headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, beneath it)."""
    rows = [
        ("accuracy", percent(metrics["accuracy"]), "95 %: " + span(metrics["accuracy_ci"], percent)),
        ("macro F1", number(metrics["f1_macro"]), "95 %: " + span(metrics["f1_macro_ci"], number)),
        ("not on the list", percent(metrics["invalid_rate"]), "of the answers"),
    ]
    if metrics["ece"] is not None:
        beneath = "" if metrics["temperature"] is None else f"at temperature {metrics['temperature']:.2f}"
        rows.append(("calibration error", number(metrics["ece"]), beneath or "as the model gives them"))
    return rows


def _row(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, its interval) for each column; no interval is empty."""
    return [
        (percent(metrics["accuracy"]), span(metrics["accuracy_ci"], percent)),
        (number(metrics["f1_macro"]), span(metrics["f1_macro_ci"], number)),
        (percent(metrics["invalid_rate"]), ""),
        (percent(metrics["top3_accuracy"]), ""),
        (number(metrics["log_loss"]), ""),
        (number(metrics["ece"]), ""),
        (number(metrics["aurc"]), ""),
    ]


def _selective(metrics: Mapping[str, Any]) -> str | None:
    if metrics["accuracy_at_80"] is None:
        return None
    return (
        f"Answering only the surest 90 % of the notes, {percent(metrics['accuracy_at_90'])} are right; of the surest"
        f" 80 %, {percent(metrics['accuracy_at_80'])}; of all, {percent(metrics['accuracy'])}."
    )


def _class_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    classes = sorted(metrics["per_class"].items(), key=lambda item: -item[1]["support"])
    return [
        (name, [str(one["support"]), number(one["precision"]), number(one["recall"]), number(one["f1"])])
        for name, one in classes
    ]


def confused_pairs(answered: Results) -> list[tuple[str, str, int, str]]:
    """The commonest errors: (true, answered, notes, their share of the true specialty's).

    An answer off the list confuses no two specialties: `beside_pairs` counts those.
    """
    spelled = answered.names
    wrong = ~answered.correct & (answered.answer < len(spelled))
    pairs, counts = np.unique(np.stack([answered.truth, answered.answer])[:, wrong], axis=1, return_counts=True)
    support = np.bincount(answered.truth, minlength=len(answered.names))
    order = np.lexsort((pairs[1], pairs[0], -counts))[:PAIRS]
    return [
        (
            spelled[pairs[0, i]],
            spelled[pairs[1, i]],
            int(counts[i]),
            percent(counts[i] / support[pairs[0, i]]),
        )
        for i in order
    ]


def beside_pairs(answered: Results) -> str:
    """What there is to say of errors that are no pair of specialties, or of there being none; empty for nothing."""
    wrong, off = int((~answered.correct).sum()), int((answered.answer == len(answered.names)).sum())
    if not wrong:
        return "Every note was answered rightly."
    if off == wrong:
        return f"No note was put under another specialty: of {wrong:,} errors all are answers that are not on the list."
    return f"Of {wrong:,} errors {off:,} are answers that are not on the list; they are no pair." if off else ""


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not data:
        return []
    rows, texts = data["rows"], data["texts"]
    test = rows.get("test", 0)
    found = [
        ("source", str(data["source"]) + (f" at {data['revision']}" if data["revision"] else "")),
        ("split", f"{data['split']}, seed {data['seed']}" + (f", fold {data['fold']}" if data["fold"] else "")),
        *((name, f"{n:,} notes, {texts[name]:,} different texts") for name, n in rows.items()),
        ("near duplicates kept together", _near(data["near_threshold"])),
        ("test notes whose text is in train", f"{data['test_texts_in_train']:,} of {test:,}"),
        ("test notes whose text is in validation", f"{data['test_texts_in_validation']:,} of {test:,}"),
        ("test notes whose text has several labels", f"{data['test_conflicts']:,} of {test:,}"),
        ("most that these allow to get right", percent(data["test_ceiling"])),
        ("rows left out", ", ".join(f"{n:,} {why}" for why, n in data["left_out"].items()) or "none"),
        ("fingerprint of the test split", data["hash"].get("test", NONE)),
    ]
    return found


def _near(threshold: float | None) -> str:
    return "no, identical texts only" if threshold is None else f"from a Jaccard similarity of {threshold:g} on"


def _run_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, NONE if value is None else str(value)) for name, value in facts.get("run", {}).items()]


def percent(value: float | None) -> str:
    """A share for a table."""
    return NONE if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """A score for a table."""
    return NONE if value is None else f"{value:.3f}"


def span(interval: Sequence[float], written: Any) -> str:  # noqa: ANN401 - percent or number
    """An interval for a table."""
    low, high = interval
    return f"{written(low).removesuffix('%')} to {written(high)}"
