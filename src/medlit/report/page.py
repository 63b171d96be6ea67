"""Write `report.html` and `report.md` of a run folder from its files alone: no model, no notes.

Both pages lay out the same list of sections, so a new table or figure is one more `Section`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medlit.atomic_io import atomic_write
from medlit.evaluation.compare import compare
from medlit.evaluation.intervals import RESAMPLES
from medlit.evaluation.metrics import EMPTY, HEADLINE, METRIC, REPORTED, Metric, number, percent
from medlit.evaluation.results import Results
from medlit.report.figures import figures
from medlit.report.systems import MODEL, System, comparable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTS = "test_facts.json"
FILES = ("report.html", "report.md")
PAIRS = 10
_INTERVALS = (
    f"Intervals are 95 %: Wilson's for accuracy; for macro F1 a bootstrap of {RESAMPLES:,} resamples over texts, in"
    " which copies of a text move together. Invalid: answers that are not on the label list, which count as wrong."
)


@dataclass(frozen=True)
class Section:
    """One section of the report."""

    title: str  # heading
    subtitle: str = ""  # what the figure or table shows
    figure: str | None = None  # name of a figure; on the HTML page only
    columns: Sequence[str] = ()  # headings of the table; none for pairs of name and value
    rows: Sequence[Sequence[Any]] = ()  # cells; a second line of a cell is small print
    sentences: Sequence[str] = ()  # below the table
    text_columns: int = 1  # number of leading columns that hold text
    half: bool = False  # may share its row of the HTML page with another such section


def write_report(folder: Path) -> dict[str, Figure]:
    """Write both pages; does nothing in a folder without any system's files.

    Returns:
        The figures of the report, by name.

    Raises:
        UserError: a system's files are damaged.
    """
    systems, others = comparable(folder)
    if not systems:
        return {}
    facts, config = folder / FACTS, folder / "config_test.yaml"
    first, drawn = systems[0], figures(systems)
    values = {
        "title": "Test report" + ("" if first.name == MODEL else f": {first.title}"),
        "summary": f"{len(first.results)} test notes, {len(first.results.names)} specialties, "
        f"{folder.absolute().parent.name}/{folder.name}",
        "cards": _cards(first.metrics),
        "sections": [
            *_result_sections(systems, [system.title for system in others], drawn),
            *_fact_sections(json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}),
        ],
        "figures": {name: _data_uri(figure) for name, figure in drawn.items()},
        "config": config.read_text(encoding="utf-8").rstrip() if config.is_file() else None,
        "disclaimer": "For research and teaching: not a medical device, not for decisions about patients. The figures"
        " hold for these notes.",
    }
    for name in FILES:
        with atomic_write(folder / name) as path:
            path.write_text(_render(name, values), encoding="utf-8")
    return drawn


def system_rows(systems: Sequence[System], metrics: Sequence[Metric]) -> list[list[str]]:
    """A row of each system: its title, and each metric with its interval on a second line."""
    return [
        [system.title, *(f"{m.value(system.metrics)}\n{m.interval(system.metrics)}".strip() for m in metrics)]
        for system in systems
    ]


def comparisons(systems: Sequence[System]) -> list[str]:
    """A sentence on the first system against each other one."""
    first, *others = systems
    return [compare(first.results, other.results).summary(other.title) for other in others]


def confused_pairs(results: Results) -> list[tuple[str, str, int, str]]:
    """The most frequent errors but invalid answers: (true, predicted, notes, share of the true specialty's notes)."""
    counts = results.confusion
    support = counts.sum(axis=1)
    errors = counts[:, :-1] * ~np.eye(len(results.names), dtype=bool)
    true, predicted = np.nonzero(errors)
    order = np.argsort(-errors[true, predicted], kind="stable")[:PAIRS]
    return [
        (results.names[t], results.names[p], int(errors[t, p]), percent(errors[t, p] / support[t]))
        for t, p in zip(true[order], predicted[order], strict=True)
    ]


def other_errors(results: Results) -> list[str]:
    """A sentence on errors that are no pair of specialties, or on there being no errors; may be empty."""
    wrong, invalid = int((~results.correct).sum()), int((results.answer == len(results.names)).sum())
    if not wrong:
        return ["Every answer is correct."]
    if invalid == wrong:
        return [f"All {wrong:,} errors are invalid answers."]
    return [f"{invalid:,} of {wrong:,} errors are invalid answers, which belong to no pair."] if invalid else []


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, small print) of the first numbers on the page."""
    cards = [
        (m.title, m.value(metrics), f"95 % CI {interval}" if (interval := m.interval(metrics)) else "of the answers")
        for m in HEADLINE
    ]
    if metrics.get("ece") is not None:
        temperature = metrics.get("temperature")
        note = "no temperature" if temperature is None else f"at temperature {temperature:.2f}"
        cards.append(("calibration error (ECE)", METRIC["ece"].value(metrics), note))
    return cards


def _result_sections(systems: Sequence[System], others: Sequence[str], drawn: Mapping[str, Figure]) -> list[Section]:
    first, metrics = systems[0], systems[0].metrics
    alone = "No other system was tested on these notes; `medlit baseline --run_dir` adds some."
    classes = sorted(metrics.get("per_class", {}).items(), key=lambda item: -item[1]["support"])
    accuracy = {n: METRIC[f"accuracy_at_{n}"].value(metrics) for n in (80, 90)}
    selective = (
        f"Accuracy on the most confident 90 % of the notes is {accuracy[90]}, on the most confident 80 %"
        f" {accuracy[80]}, on all {METRIC['accuracy'].value(metrics)}."
    )
    found = [
        Section(
            "Systems on the same notes",
            _INTERVALS,
            columns=["system", *(metric.title for metric in REPORTED)],
            rows=system_rows(systems, REPORTED),
            sentences=[
                *(comparisons(systems) or [alone]),
                *(f"Left out: {title}, which was tested on other notes." for title in others),
            ],
        ),
        Section(
            "Scores per specialty",
            "F1 of each specialty, the most frequent first, with its number of test notes. Bars: the first system.",
            figure="classes",
            columns=("specialty", "test notes", "precision", "recall", "F1"),
            rows=[
                (name, scores["support"], *(number(scores[key]) for key in ("precision", "recall", "f1")))
                for name, scores in classes
            ],
        ),
        Section(
            "Confusion matrix",
            "Rows are true specialties; colours are shares of a row and numbers are notes. The last column holds"
            " answers that are not on the label list.",
            figure="confusion",
        ),
        Section(
            "Most confused pairs",
            columns=("true", "predicted", "notes", "share of the true specialty"),
            rows=confused_pairs(first.results),
            sentences=other_errors(first.results),
            text_columns=2,
        ),
        Section(
            "Reliability",
            "Accuracy against mean confidence, with 95 % intervals, in bins of equally many notes. A calibrated"
            " system lies on the diagonal: of answers with 80 % confidence, 80 % are correct.",
            figure="reliability",
            half=True,
        ),
        Section(
            "Selective prediction (risk-coverage)",
            "Share of errors if only the most confident notes are answered and the others are left to a person. A"
            " system without probabilities is a point: it answers every note.",
            figure="risk_coverage",
            sentences=[] if metrics.get("accuracy_at_80") is None else [selective],
            half=True,
        ),
        Section(
            "Accuracy by prompt length",
            "Accuracy in bins of equally many notes by the length of their prompt, with 95 % intervals.",
            figure="length",
        ),
    ]
    return [section for section in found if section.figure in drawn or section.rows or section.sentences]


def _fact_sections(facts: Mapping[str, Any]) -> list[Section]:
    """Data, settings and versions; a fact that an older version did not record is left out."""
    data = facts.get("data") or {}
    classes = [(name, *counts) for name, counts in data.get("classes", {}).items()]
    run = [(name, EMPTY if value is None else value) for name, value in facts.get("run", {}).items()]
    found = [
        Section("Data and split", rows=_data_rows(data), text_columns=2, half=True),
        Section("Class distribution", columns=("specialty", "train", "validation", "test"), rows=classes, half=True),
        Section("Run", rows=run, text_columns=2, half=True),
        Section("Versions", rows=list(facts.get("versions", {}).items()), text_columns=2, half=True),
    ]
    return [section for section in found if section.rows]


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not data:
        return []
    texts, test = data.get("texts", {}), data.get("rows", {}).get("test", 0)
    threshold = data.get("near_threshold")
    rows = [
        ("source", f"{data['source']}" + (f" at {data['revision']}" if data.get("revision") else "")),
        ("split", f"{data['split']}, seed {data['seed']}" + (f", fold {data['fold']}" if data.get("fold") else "")),
        *((name, f"{n:,} notes, {texts.get(name, n):,} distinct texts") for name, n in data.get("rows", {}).items()),
        (
            "near-duplicates kept together",
            "no, identical texts only" if threshold is None else f"from Jaccard similarity {threshold:g}",
        ),
    ]
    shared = {
        "test_texts_in_train": "test notes whose text is in train",
        "test_texts_in_validation": "test notes whose text is in validation",
        "test_conflicts": "test notes whose text has several labels",
    }
    rows += [(title, f"{data[key]:,} of {test:,}") for key, title in shared.items() if key in data]
    if "test_ceiling" in data:
        rows.append(("highest accuracy that these labels allow", percent(data["test_ceiling"])))
    if "left_out" in data:
        rows.append(("rows left out", ", ".join(f"{n:,} {why}" for why, n in data["left_out"].items()) or "none"))
    rows.append(("fingerprint of the test split", data.get("hash", {}).get("test", EMPTY)))
    return rows


def _render(name: str, values: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("medlit", "report"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = _markdown_cell
    return environment.get_template(f"page{Path(name).suffix}.j2").render(values) + "\n"


def _markdown_cell(value: object) -> str:
    text, _, small_print = str(value).partition("\n")
    # A bar in a label would end the cell.
    return (f"{text} ({small_print})" if small_print else text).replace("|", r"\|")


def _data_uri(figure: Figure) -> str:
    """A figure as part of the page."""
    import matplotlib as mpl

    stream = io.BytesIO()
    # Without a date and random ids, equal figures are equal files.
    with mpl.rc_context({"svg.hashsalt": "medlit"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
