"""`medlit audit`: what can be wrong with the notes, told before they are trained on.

It reads the `data` settings of any config (`--config`, several, layered) or flags such as `--data.source notes.csv`,
and prints duplicates, conflicts, leakage between splits, balance, lengths and columns that give the label away, as
counts and row ids. `--output DIR` also writes `audit.json` and `audit.png`. Exit code 0, or 3 with `--strict` when a
limit is passed. Reading a Hub dataset here fills the cache that later runs use offline.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.data.audit import audit
from medlit.errors import UserError
from medlit.runs import whole_file
from medlit.tools.audit.figure import audit_figure
from medlit.tools.audit.limits import add_limits, passed_limits
from medlit.tools.audit.show import show
from medlit.tools.settings import data_module, settings

if TYPE_CHECKING:
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.prompts import AlpacaPrompt

PASSED = 3  # exit code when a limit is passed


def run(args: Sequence[str]) -> int:
    """Audit the notes that the settings name.

    Args:
        args: the arguments after `medlit audit`.

    Returns:
        0, or 3 with `--strict` when a limit is passed.

    Raises:
        UserError: the settings or the source cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="medlit audit",
        usage="medlit audit [--config FILE ...] [--data.KEY VALUE ...] [--output DIR] [--strict] [limits]",
        description=__doc__.partition("\n\n")[2],
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write audit.json and audit.png to")
    parser.add_argument("--strict", action="store_true", help=f"exit with code {PASSED} when a limit is passed")
    add_limits(parser)
    options, rest = parser.parse_known_args(args)
    data = data_module(settings("audit", rest))
    prompt = _prompt(data)
    found = audit(
        data.source,
        revision=data.revision,
        columns=data.columns,
        labels=data.labels,
        near_threshold=data.split_settings.near_threshold,
        count_tokens=None if prompt is None else partial(_count_tokens, prompt),
        limit=None if prompt is None else prompt.room,
    )
    show(found.report)
    passed = passed_limits(found.report, options)
    for text in passed:
        print(f"over a limit: {text}")
    if options.output is not None:
        with whole_file(options.output / "audit.json") as path:
            content = found.report.as_dict() | {"over_limits": passed}
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with whole_file(options.output / "audit.png") as path:
            audit_figure(found).savefig(path, dpi=110)
        print(f"written: {options.output / 'audit.json'}, {options.output / 'audit.png'}")
    return PASSED if passed and options.strict else 0


def _prompt(data: TranscriptionDataModule) -> AlpacaPrompt | None:
    """The prompt that knows the tokens of a note; None, and a word about it, where its tokenizer is not to be had."""
    try:
        return data.prompt
    except UserError as error:
        print(f"Lengths are given in words only. {error}", file=sys.stderr)
        return None


def _count_tokens(prompt: AlpacaPrompt, transcriptions: list[str]) -> list[int]:
    """Tokens of each transcription, those that would be cut included."""
    template = len(prompt.header) + len(prompt.footer)
    return [len(one.input_ids) - template + one.cut_tokens for one in prompt.prompts(transcriptions)]
