"""One finding of the doctor, and the words that its checks share."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Literal

REINSTALL = "make clean install"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


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
    status: Literal["ok", "warn", "fail"]
    found: str
    cure: str = ""


def version_of(package: str) -> str:
    """The installed version of a package, or nothing when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
