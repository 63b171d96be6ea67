"""Write `report.html` and `report.md` of a run folder from its files alone: no model, no notes.

Both pages lay out the sections of `sections.yaml`, so a new table or figure is one more entry there.
"""

import base64
import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from lightning.pytorch import Trainer, callbacks
from matplotlib.figure import Figure

from medlit.atomic_io import atomic_write
from medlit.evaluation.intervals import compare_systems
from medlit.evaluation.metrics import EMPTY, HEADLINE, METRIC, REPORTED, Metric, applicable, number, percent
from medlit.evaluation.results import Results
from medlit.evaluation.sets import BEST_F1
from medlit.report.figures import figures
from medlit.report.systems import FACTS, MODEL, TITLES, System, comparable, read_run_file

FILES = ("report.html", "report.md")
PAIRS = 10
_TEXTS, _FIELDS, *_SECTIONS = yaml.safe_load(Path(__file__).with_name("sections.yaml").read_text(encoding="utf-8"))


def write_report(folder: Path) -> dict[str, Figure]:
    """Write both pages, and return their figures by name; does nothing in a folder without any system's files."""
    systems, others = comparable(folder)
    if not systems:
        return {}
    config = folder / "config_test.yaml"
    first, drawn = systems[0], figures(systems)
    contents = _contents(systems, others, read_run_file(folder / FACTS))
    sections = [_FIELDS | fields | contents.get(fields["title"], {}) for fields in _SECTIONS]
    values = {
        "title": "Test report" + ("" if first.title == TITLES[MODEL] else f": {first.title}"),
        "summary": f"{len(first.results)} test notes, {len(first.results.names)} specialties, "
        f"{folder.absolute().parent.name}/{folder.name}",
        "cards": _cards(first.metrics),
        "sections": [each for each in sections if each["figure"] in drawn or each["rows"] or each["sentences"]],
        "figures": {name: _data_uri(figure) for name, figure in drawn.items()},
        "config": _settings(config) if config.is_file() else None,
        "disclaimer": _TEXTS["disclaimer"],
    }
    pages = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    pages.loader, pages.autoescape = PackageLoader("medlit", "report"), select_autoescape(["html.j2"])
    pages.filters["cell"] = _markdown_cell
    for name in FILES:
        with atomic_write(folder / name) as path:
            path.write_text(pages.get_template(f"page{path.suffix}.j2").render(values) + "\n", encoding="utf-8")
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
    this = "the fine-tuned model" if first.title == TITLES[MODEL] else first.title
    return [compare_systems(first.results, other.results).summary(other.title, this) for other in others]


def confused_pairs(results: Results) -> list[tuple[str, str, int, str]]:
    """The most frequent errors but invalid answers: (true, predicted, notes, share of the true specialty's notes)."""
    support = np.bincount(results.truth)
    return [
        (results.names[true], results.names[answer], notes, percent(notes / support[true]))
        for true, answer, notes in list(zip(*(each.tolist() for each in results.errors), strict=True))[:PAIRS]
    ]


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, small print) of the first numbers on the page."""
    cards = [
        (m.title, m.value(metrics), f"95% CI {interval}" if (interval := m.interval(metrics)) else "of the answers")
        for m in applicable(HEADLINE, metrics)
    ]
    if metrics.get("ece") is not None:
        temperature = metrics.get("temperature")
        note = "no temperature" if temperature is None else f"at temperature {temperature:.2f}"
        cards.append(("calibration error (ECE)", METRIC["ece"].value(metrics), note))
    return cards


def _contents(systems: Sequence[System], others: Sequence[System], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Title of a section -> the fields that `sections.yaml` lacks; a fact that was not recorded is left out."""
    metrics = systems[0].metrics
    left_out = [f"Left out: {system.title}, which was tested on other notes." for system in others]
    bars = f"{_TEXTS['bars']} {systems[0].title}" + ("; dots: the others." if systems[1:] else ".")
    scores = [
        (name, of_class["support"], *(number(of_class[key]) for key in ("precision", "recall", "f1")))
        for name, of_class in sorted(metrics.get("per_class", {}).items(), key=lambda item: -item[1]["support"])
    ]
    data, reported = facts.get("data") or {}, applicable(REPORTED, metrics)
    warned = [f"Warning: {data['mismatch']}"] if "mismatch" in data else []
    any_of = [_TEXTS["any_of"]] if METRIC["any_of_accuracy"] in reported else []
    return {
        "Systems on the same notes": {
            "columns": ["system", *(metric.title for metric in reported)],
            "rows": system_rows(systems, reported),
            "sentences": [*warned, *(comparisons(systems) or [_TEXTS["alone"]]), *left_out, *any_of],
        },
        "Scores per specialty": {"subtitle": bars, "rows": scores},
        "Most confused pairs": {"rows": confused_pairs(systems[0].results)},
        "Selective prediction (risk-coverage)": {
            "sentences": [] if metrics.get("accuracy_at_80") is None else [_TEXTS["selective"].format(**metrics)]
        },
        "Prediction sets": _sets(metrics["sets"]) if metrics.get("sets") else {},
        "Data and split": {"rows": _data_rows(data)},
        "Class distribution": {"rows": [(name, *counts) for name, counts in data.get("classes", {}).items()]},
        "Run": {"rows": [(name, EMPTY if value is None else value) for name, value in facts.get("run", {}).items()]},
        "Versions": {"rows": list(facts.get("versions", {}).items())},
    }


def _sets(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Table and sentences on a test's sets."""
    lengths = [("{:,} to {:,} tokens".format(*part["tokens"]), part) for part in sets["by_length"]]
    parts = [("all", sets), *lengths, *sets["per_class"].items()]
    names = ["best_f1" if sets["key"] == BEST_F1 else "guarantee", "sizes", "as_answers"]
    sentences = [_TEXTS[name].format(**sets) for name in names]
    form = "{notes}\t{coverage:.1%}\n{coverage_ci[0]:.1%} to {coverage_ci[1]:.1%}\t{mean_size:.2f}"
    return {"rows": [(name, *form.format(**part).split("\t")) for name, part in parts], "sentences": sentences}


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not data:
        return []
    texts, test = data.get("texts", {}), data.get("rows", {}).get("test", 0)
    threshold = data.get("near_threshold")
    seed = "" if data["seed"] is None else f", seed {data['seed']}"
    together = "no, identical texts only" if threshold is None else f"from Jaccard similarity {threshold:g}"
    rows = [
        ("source", f"{data['source']}" + (f" at {data['revision']}" if data.get("revision") else "")),
        ("split", data["split"] + seed + (f", fold {data['fold']}" if data.get("fold") else "")),
        *((name, f"{n:,} notes, {texts.get(name, n):,} distinct texts") for name, n in data.get("rows", {}).items()),
        ("near-duplicates kept together", together),
    ]
    rows += [(title, f"{data[key]:,} of {test:,}") for key, title in _TEXTS["shared"].items() if key in data]
    if "test_ceiling" in data:
        rows.append(("accuracy ceiling (texts with several labels)", percent(data["test_ceiling"])))
    if "left_out" in data:
        rows.append(("rows left out", ", ".join(f"{n:,} {why}" for why, n in data["left_out"].items()) or "none"))
    rows.append(("fingerprint of the test split", data.get("hash", {}).get("test", EMPTY)))
    return rows


def _settings(config: Path) -> str:
    """The settings of a test, without those that Lightning adds and that have Lightning's value."""
    kinds = {"trainer": Trainer, "checkpoint": callbacks.ModelCheckpoint, "early_stopping": callbacks.EarlyStopping}
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, kind in kinds.items():
        given, known = settings.get(name) or {}, inspect.signature(kind).parameters
        settings[name] = {key: value for key, value in given.items() if key not in known or value != known[key].default}
    settings = {key: value for key, value in settings.items() if value != {}}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()


def _markdown_cell(value: object) -> str:
    text, _, small_print = str(value).partition("\n")
    return (f"{text} ({small_print})" if small_print else text).replace("|", r"\|")


def _data_uri(figure: Figure) -> str:
    """A figure as part of the page."""
    stream = io.BytesIO()
    # Without a date and random ids, equal figures are equal files.
    with mpl.rc_context({"svg.hashsalt": "medlit"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
