"""The child process of `medlit doctor`, faked."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict

from medlit.tools.doctor import CheckResult


class Child:
    """A process that has ended, or hangs."""

    def __init__(self, out: str = "", err: str = "", code: int = 0, *, hangs: bool = False) -> None:
        self.out, self.err, self.returncode, self.hangs = out, err, code, hangs

    def communicate(self, timeout: float | None) -> tuple[str, str]:
        if self.hangs:
            raise subprocess.TimeoutExpired("probe", timeout or 0)
        return self.out, self.err

    def kill(self) -> None:
        self.hangs = False


def lines(*results: CheckResult) -> str:
    return "\n".join(json.dumps(asdict(result)) for result in results)
