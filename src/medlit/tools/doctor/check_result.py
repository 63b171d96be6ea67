"""One finding of the doctor, and the words that its checks share."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

REINSTALL = "make clean install"
# Checks that more than one file knows of.
CONFIG, EXAMPLE, TRIAL = "config", "example", "trial"
Status = Literal["ok", "warn", "fail"]
# The checkout that medlit runs from; of an installed medlit, a folder without requirements/.
CHECKOUT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: what was looked at.
        status: `ok`; `warn`, the job runs but not as it might; `fail`, the job cannot run.
        found: what was found.
        cure: what to do about it; empty when there is nothing to do.
    """

    check: str
    status: Status
    found: str
    cure: str = ""


def told(check: str, status: Status, error: Exception) -> Row:
    """A finding out of a user's mistake, whose sentence names what is wrong and, behind a semicolon, the cure."""
    found, _, cure = str(error).rstrip(".").partition("; ")
    return Row(check, status, found, cure or "mend what is named on the left")


def version_of(package: str) -> str:
    """The installed version of a package, or nothing when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
