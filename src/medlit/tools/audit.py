"""`medlit audit`: the quality of the notes before training on them, as a table, `audit.json` and a figure."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medlit.atomic_io import atomic_write, write_json
from medlit.cli import tool_parser
from medlit.cli.arguments import make_datamodule, parse_settings
from medlit.cli.environment import check_writable
from medlit.data.audit import FEW, NEAR_ROWS, SHORT, Audit, AuditReport, audit
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.label_errors import FEWEST, LABELS_CHECKED
from medlit.data.prompt import NotePrompt
from medlit.data.sources import reads
from medlit.errors import UserError, best_effort, tell
from medlit.paths import local_path
from medlit.report.figures import MOST_LABELS, short
from medlit.run_folder import check_replaceable
from medlit.tools import print_table

EXIT_OVER_LIMIT = 3
_BARS = 40
_COLOURS = {"train": "#3b6ea5", "validation": "#e0a458", "test": "#7fb685", "all": "#3b6ea5"}

# A line of the table: what was counted; a count, share or length; ids or details; whether it is a warning.
_Line = tuple[str, str, str, bool]


def run(args: Sequence[str]) -> int:
    """Audit the notes that the settings name; returns 3 with `--strict` when a limit is exceeded."""
    options, rest = tool_parser("audit").parse_known_args(args)
    config = parse_settings("audit", rest)
    if options.output is not None:
        options.output = local_path("output", options.output)
        check_writable("output", options.output / "audit.json")
        if (source := config.data.source) != "builtin" and reads(source, options.output / "audit.json"):
            raise UserError(f"output: audit.json would be among the notes of {source}; name another folder.")
        if not config.overwrite:
            check_replaceable(options.output, "audit")
    data = make_datamodule(config)
    result = audit(data, partial(_prompt, data))
    exceeded = _exceeded_limits(result.report, options)
    if options.output is not None:  # before it prints, which ends the process if nothing reads it
        write_json(options.output / "audit.json", asdict(result.report) | {"over_limits": exceeded})
        with best_effort("the audit's figure"), atomic_write(options.output / "audit.png") as path:
            audit_figure(result).savefig(path, dpi=110)
    _print_report(result.report)
    if result.report.conflicts["groups"] and data.label_conflicts != "merge":
        print("`data.label_conflicts: merge` makes a text with several specialties one note with all of them.\n")
    if any(";" in label or "|" in label for label in result.report.label_review.combined):
        print("`data.labels.separator` keeps all specialties of a cell that holds several.\n")
    suggested = result.report.label_review.suggested(data.labels)
    if suggested != data.labels:
        print("Check these labels. With the right ones of these lines in the config, they are merged and left out:")
        print(yaml.safe_dump({"data": {"labels": asdict(suggested)}}, allow_unicode=True, sort_keys=False, width=1000))
    for message in exceeded:
        print(f"{'over a limit' if options.strict else 'would fail with --strict'}: {message}")
    if options.output is not None:
        print(f"medlit: written: {options.output / 'audit.json'}, {options.output / 'audit.png'}")
    return EXIT_OVER_LIMIT if exceeded and options.strict else 0


def _prompt(data: TranscriptionDataModule) -> NotePrompt | None:
    """The prompt, whose tokens are counted; None where the base model's tokenizer is not available."""
    try:
        return data.prompt
    except UserError as error:
        tell(f"lengths are in words only, because the tokenizer is not available. {error}")
        return None


def _exceeded_limits(report: AuditReport, options: argparse.Namespace) -> list[str]:
    """A message for each limit that a report exceeds."""
    leaked = [rows / report.splits[pair.partition("/")[2]] for pair, rows in report.leakage.items()]
    shares = {
        "max_leakage": ("whose text is also in an earlier split", max(leaked, default=0.0)),
        "max_conflicts": ("whose text has several labels", report.conflicts["rows"] / report.rows),
        "max_cut": ("that are cut to the prompt's length", report.lengths.get("tokens", {}).get("share_cut", 0.0)),
    }
    messages = [
        f"notes {which}: {100 * share:.3g}% (--{flag} {limit:g})"
        for flag, (which, share) in shares.items()
        if (limit := getattr(options, flag)) is not None and share > limit
    ]
    faults = {"that are empty": report.empty["rows"], "without a label": report.unlabelled}
    return messages + [f"notes {fault}: {rows:,}" for fault, rows in faults.items() if rows]


def _print_report(report: AuditReport) -> None:
    """Print counts, shares and the first row ids of every finding, and the notes of each specialty."""
    lines = list(_lines(report))
    styles = ["yellow" if line[3] else "" for line in lines]
    headings, rows = ("finding", "value", "details"), [line[:3] for line in lines]
    print_table(f"medlit audit: {report.source}", headings, rows, ["value"], styles)
    classes = []
    for name, notes in list(report.classes.items())[:MOST_LABELS]:
        counts = [f"{report.classes_by_split[split].get(name, 0):,}" for split in report.splits]
        classes.append([name, *counts, f"{notes / report.rows:.1%}"])
    counted = [*report.splits, "share"]
    print_table("notes of each specialty", ["specialty", *counted], classes, counted)
    if len(report.classes) > MOST_LABELS:
        print(f"and {len(report.classes) - MOST_LABELS:,} less frequent specialties, in audit.json")


def _lines(report: AuditReport) -> Iterator[_Line]:
    splits = ", ".join(f"{name} {rows:,}" for name, rows in report.splits.items())
    yield "notes", f"{report.rows:,}", splits if len(report.splits) > 1 else "one table without splits", False
    yield "specialties", f"{len(report.classes):,}", "", False
    few = [f"{name!r} ({notes})" for name, notes in report.classes.items() if notes < FEW]
    yield f"specialties with fewer than {FEW} notes, too few to test", f"{len(few):,}", _first(few), bool(few)
    yield "notes without a specialty", _share(report.unlabelled, report.rows), "", report.unlabelled > 0
    for unit, lengths in report.lengths.items():
        spread = ", ".join(f"{name} {lengths[name]:,.0f}" for name in ("mean", "p95", "max"))
        yield f"{unit} per note (median)", f"{lengths['p50']:,.0f}", spread, False
    if "tokens" in report.lengths:
        limit, cut = report.lengths["tokens"]["limit"], report.lengths["tokens"]["share_cut"]
        yield f"notes longer than {limit:,} tokens (max_length less prompt and answer)", f"{cut:.1%}", "", cut > 0
    yield _rows_line("empty notes", report.empty, report.rows)
    yield _rows_line(f"notes of fewer than {SHORT} words", report.short, report.rows)
    yield _rows_line("notes with identical texts", report.duplicates, report.rows)
    if report.near_duplicates is None:
        yield "near duplicates", "?", f"not searched for: over {NEAR_ROWS:,}; set --data.split.near_threshold", False
    else:
        name = f"near duplicates (Jaccard similarity of {report.near_threshold} or more)"
        yield _rows_line(name, report.near_duplicates, report.rows)
    yield _rows_line("notes whose text has several specialties", report.conflicts, report.rows)
    if report.label_pairs:
        pairs = ["{labels[0]!r} + {labels[1]!r}: {texts:,}".format(**pair) for pair in report.label_pairs]
        yield "most texts that two labels share", f"{report.label_pairs[0]['texts']:,}", _first(pairs), True
    ceiling, near = report.accuracy_ceiling, report.near_accuracy_ceiling
    details = "" if near in (None, ceiling) else f"{near:.1%} if similar texts get one answer"
    yield "accuracy ceiling (one answer per text)", f"{ceiling:.1%}", details, ceiling < 1
    review = report.label_review
    similar = {label: [other] for label, other in review.similar.items()}
    yield _labels_line("labels that nearly agree with another", similar, report)
    yield _labels_line("labels that hold several", review.combined, report)
    yield _labels_line("labels that seem to mean 'no label'", dict.fromkeys(review.placeholders, ()), report)
    if (errors := report.label_errors) is None:
        limits = f"under {FEWEST} texts per label, or over {LABELS_CHECKED} labels"
        yield "probable label errors", "?", f"not searched for: {limits}", False
    else:
        pairs = ["{labels[0]!r} + {labels[1]!r}: {share:.0%} crossed".format(**pair) for pair in errors["confused"]]
        yield "labels that TF-IDF hardly tells apart", f"{len(pairs):,}", _first(pairs), bool(pairs)
        form = "{id}: {given} {p_given:.2f}, rather {suggested} {p_suggested:.2f}"
        wrong = [form.format(**note | {"given": " + ".join(note["given"])}) for note in errors["mislabelled"]]
        name = f"probably mislabelled (TF-IDF agrees with {errors['agreement']:.0%} of {errors['texts']:,} texts)"
        yield name, _share(len(wrong), report.rows), _first(wrong), bool(wrong)
    for pair, rows in report.leakage.items():
        earlier, _, later = pair.partition("/")
        near = 0 if report.near_leakage is None else report.near_leakage[pair] - rows
        name, value = f"{later} notes whose text is also in {earlier}", _share(rows, report.splits[later])
        yield name, value, f"and {near:,} near duplicates" if near else "", rows + near > 0
    for name, share in report.label_leaks.items():
        yield f"column {name!r} gives the specialty away", f"{share:.1%}", "of its values", True


def _first(details: Sequence[str], number: int | None = None) -> str:
    return "; ".join(details[:5]) + " ..." * ((len(details) if number is None else number) > 5)


def _share(rows: int, total: int) -> str:
    return f"{rows:,} ({rows / total:.1%})" if rows else "0"


def _rows_line(name: str, finding: dict[str, Any], total: int) -> _Line:
    rows, groups, listed = finding["rows"], finding.get("groups", 0), finding["ids"]
    if groups:
        listed = [" = ".join(ids if len(ids) <= 3 else [*ids[:3], "..."]) for ids in listed]
    counted = f"{groups:,} group{'s' * (groups != 1)}: " if groups else ""
    return name, _share(rows, total), counted + _first(listed, groups or rows), rows > 0


def _labels_line(name: str, found: Mapping[str, Sequence[str]], report: AuditReport) -> _Line:
    listed = [repr(label) + " = " * bool(others) + " + ".join(map(repr, others)) for label, others in found.items()]
    return name, _share(sum(report.classes[label] for label in found), report.rows), _first(listed), bool(found)


def audit_figure(audit: Audit) -> Figure:
    """Draw the class balance, stacked by split, beside the distribution of lengths with the limit, if there is one."""
    names = {name: short(name) for name in list(audit.report.classes)[:MOST_LABELS]}
    height = max(4.0, 1.6 + 0.3 * len(names))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    balance, lengths = figure.subplots(1, 2)
    figure.suptitle(audit.report.source, fontsize=11, color="#555555", parse_math=False)
    _draw_balance(balance, audit.report, names)
    _draw_lengths(lengths, audit)
    for axis in (balance.xaxis, lengths.xaxis, lengths.yaxis):  # counts: no fractions
        axis.set_major_locator(MaxNLocator(integer=True))
    for axes in (balance, lengths):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.72 / height), ncols=3, frameon=False)
    return figure


def _draw_balance(axes: Axes, report: AuditReport, shown: Mapping[str, str]) -> None:
    names = list(shown)[::-1]  # the most frequent on top
    left = np.zeros(len(names))
    for split, counts in report.classes_by_split.items():
        notes = np.array([counts.get(name, 0) for name in names])
        label = split if len(report.splits) > 1 else None
        bars = axes.barh(range(len(names)), notes, left=left, color=_COLOURS[split], label=label)
        left += notes
    axes.bar_label(bars, [f"{report.classes[name]:,}" for name in names], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), [shown[name] for name in names])
    axes.margins(x=0.12)
    spare = max(0, 4 - len(names)) / 2  # one or two bars would fill the frame
    axes.set_ylim(-0.6 - spare, len(names) - 0.4 + spare)
    more = f", the {len(names)} most frequent" if len(names) < len(report.classes) else ""
    axes.set(xlabel="notes", title=f"{report.rows:,} notes, {len(report.classes):,} specialties{more}")


def _draw_lengths(axes: Axes, audit: Audit) -> None:
    unit = "tokens" if "tokens" in audit.lengths else "words"
    lengths, summary = audit.lengths[unit], audit.report.lengths[unit]
    # One note of 100,000 tokens would press all others into a single bar: the last bar holds all longer notes.
    end = max(1.0, min(summary["max"], 1.5 * summary["p99"]))
    width = -(-end // _BARS)  # an integer: bars of 2.5 would hold two lengths or three in turn, and look like a pattern
    bars = np.arange(0, end + width, width)
    axes.hist(np.minimum(lengths, bars[-1]), bins=bars.tolist(), color="#9db8d2", edgecolor="white", linewidth=0.5)
    marks = [("median", summary["p50"], "--", "#1d3557"), ("p95", summary["p95"], ":", "#1d3557")]
    title = f"{unit} per note"
    if (limit := summary.get("limit")) is not None:
        title += f": {summary['share_cut']:.1%} over the limit of {limit:,.0f}"
        if limit <= 2 * end:
            marks.append(("limit", limit, "-", "#c1121f"))
    for name, value, style, colour in marks:
        axes.axvline(value, color=colour, linewidth=1.5, linestyle=style, label=f"{name} {value:,.0f}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    longer = "" if end == summary["max"] else "; the last bar: all longer notes"
    axes.set(xlim=(0, 1.03 * max(bars[-1], *(value for _, value, *_ in marks))), ylabel="notes", title=title)
    axes.set_xlabel(f"{unit} (longest {summary['max']:,.0f}{longer})")
