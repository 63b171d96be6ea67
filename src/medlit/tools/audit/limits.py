"""What an audit may find before `--strict` makes it fail."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medlit.data.audit import SHORT, AuditReport


@dataclass(frozen=True)
class Limit:
    """One bound on a number from 0 to 1.

    Attributes:
        flag: name on the command line, which begins with `max` or `min`.
        default: the bound when none is declared; None: not checked.
        what: what is bounded.
        measure: the number in a report; None when it was not looked for.
    """

    flag: str
    default: float | None
    what: str
    measure: Callable[[AuditReport], float | None]

    def passed(self, report: AuditReport, bound: float | None) -> str | None:
        """What is over (or under) the bound, in words, or None when nothing is."""
        found = self.measure(report)
        if found is None or bound is None:
            return None
        within = found >= bound if self.flag.startswith("min") else found <= bound
        return None if within else f"{self.what} is {found:.4g}; --{self.flag} allows {bound:.4g}"


def _rows(finding: dict[str, Any] | None, report: AuditReport) -> float | None:
    return None if finding is None else finding["rows"] / report.rows


def _leaked(rows: dict[str, int] | None, report: AuditReport) -> float | None:
    if rows is None:
        return None
    return max((n / report.splits[pair.partition("/")[2]] for pair, n in rows.items()), default=0.0)


def _leak(report: AuditReport) -> float:
    return max(report.label_leaks.values(), default=0.0)


def _cut(report: AuditReport) -> float | None:
    return report.lengths.get("tokens", {}).get("share_cut")


_LEAKED = "the share of a split's notes that stand in an earlier split"
_LABELS = "the share of notes whose text carries several labels"
_TOLD = "the largest share of a column's values that give the label away"

LIMITS = (
    Limit("max_leakage", 0.0, _LEAKED, lambda report: _leaked(report.leakage, report)),
    Limit("max_near_leakage", None, f"{_LEAKED}, or nearly", lambda report: _leaked(report.near_leakage, report)),
    Limit("max_conflicts", 0.0, _LABELS, lambda report: _rows(report.conflicts, report)),
    Limit("max_empty", 0.0, "the share of empty notes", lambda report: _rows(report.empty, report)),
    Limit("max_unlabelled", 0.0, "the share of unlabelled notes", lambda report: report.unlabelled / report.rows),
    Limit("max_short", None, f"the share of notes of under {SHORT} words", lambda report: _rows(report.short, report)),
    Limit("max_duplicates", None, "the share of repeated notes", lambda report: _rows(report.duplicates, report)),
    Limit(
        "max_near_duplicates", None, "the share of alike notes", lambda report: _rows(report.near_duplicates, report)
    ),
    Limit("max_cut", None, "the share of notes that are cut", _cut),
    Limit("max_label_leak", None, _TOLD, _leak),
    Limit("min_accuracy_ceiling", None, "the ceiling on accuracy", lambda report: report.accuracy_ceiling),
)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each limit."""
    group = parser.add_argument_group("limits, each from 0 to 1, that --strict holds the audit to")
    for limit in LIMITS:
        side = "least" if limit.flag.startswith("min") else "largest"
        default = "not checked" if limit.default is None else f"{limit.default:g}"
        text = f"{side} {limit.what.removeprefix('the ').removeprefix('largest ')} (default: {default})"
        group.add_argument(f"--{limit.flag}", type=float, default=limit.default, metavar="SHARE", help=text)


def passed_limits(report: AuditReport, options: argparse.Namespace) -> list[str]:
    """Every limit that a report passes, in words."""
    found = (limit.passed(report, getattr(options, limit.flag)) for limit in LIMITS)
    return [text for text in found if text is not None]
