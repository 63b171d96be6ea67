"""`medlit audit`: check the quality of the notes before training on them.

It reads the notes before anything is split or left out, and prints duplicates, conflicting labels, leakage between
splits, class balance, lengths and columns that give the label away: counts and row ids, never a note. Reading a Hub
dataset here fills the cache that later runs use offline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.atomic_io import atomic_write, write_json
from medlit.data.audit import AuditReport, audit
from medlit.errors import UserError
from medlit.tools.audit.report import audit_figure, print_report

if TYPE_CHECKING:
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.prompt import AlpacaPrompt

EXIT_OVER_LIMIT = 3

_ABOUT = "C" + __doc__.partition(": c")[2]
_USAGE = "medlit audit [--config FILE ...] [--data.KEY VALUE ...] [--output DIR] [--strict] [limits]"
_EXAMPLES = """
examples:
  medlit audit --data.source notes.csv --data.columns.label department --output audit
  medlit audit --config configs/llama31_8b.yaml --strict --max_conflicts 0.02
"""
_SETTINGS = """\
settings, the same as of 'medlit fit' (whose --help explains all of them):
  --config FILE         a config; several are layered, and only their settings of data and base model are used
  --data.source SOURCE  'builtin', a file, a folder, a glob or a Hub dataset id
  --data.columns.text NAME, --data.columns.label NAME, --data.columns.id NAME
                        the columns that hold note, specialty and id
  --data.split.near_threshold SHARE
                        least Jaccard similarity of near duplicates (default: 0.8, for at most 50,000 notes: the search
                        takes a minute for every 40,000)
  --model.language_model.base_model MODEL
                        its tokenizer counts tokens; without one, lengths are in words only

exit code: 0; 3 when --strict is given and a limit is exceeded; 2 after a mistake in the settings or the notes.
"""
# Limit -> (its default, None for no limit; what is limited).
_LIMITS = {
    "max_leakage": (0.0, "share of a split's notes whose text is also in an earlier split"),
    "max_conflicts": (0.0, "share of notes whose text has several labels"),
    "max_cut": (None, "share of notes that are cut to the prompt's length"),
}


def run(args: Sequence[str]) -> int:
    """Audit the notes that the settings name.

    Args:
        args: the arguments after `medlit audit`.

    Returns:
        0, or 3 with `--strict` when a limit is exceeded.

    Raises:
        UserError: the settings or the source cannot be read.
    """
    options, rest = _parser().parse_known_args(args)
    # After --help: these imports take seconds.
    from medlit.cli.arguments import make_datamodule, parse_settings
    from medlit.cli.environment import check_writable

    if options.output is not None:
        check_writable("output", options.output / "audit.json")
    data = make_datamodule(parse_settings("audit", rest))
    prompt = _prompt(data)
    result = audit(
        data.source,
        revision=data.revision,
        columns=data.columns,
        labels=data.labels,
        near_threshold=data.split.near_threshold,
        count_tokens=None if prompt is None else partial(_count_tokens, prompt),
        limit=None if prompt is None else prompt.room,
    )
    print_report(result.report)
    exceeded = _exceeded_limits(result.report, options)
    for message in exceeded:
        print(f"over a limit: {message}")
    if options.output is not None:
        write_json(options.output / "audit.json", result.report.as_dict() | {"over_limits": exceeded})
        with atomic_write(options.output / "audit.png") as path:
            audit_figure(result).savefig(path, dpi=110)
        print(f"written: {options.output / 'audit.json'}, {options.output / 'audit.png'}")
    return EXIT_OVER_LIMIT if exceeded and options.strict else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medlit audit",
        usage=_USAGE,
        description=_ABOUT + _EXAMPLES,
        epilog=_SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write audit.json and audit.png to")
    parser.add_argument("--strict", action="store_true", help="exit with code 3 when a limit is exceeded")
    group = parser.add_argument_group("limits for --strict, from 0 to 1; no note may be empty or without a label")
    for flag, (default, meaning) in _LIMITS.items():
        text = f"largest {meaning} (default: {'not checked' if default is None else f'{default:g}'})"
        group.add_argument(f"--{flag}", type=float, default=default, metavar="SHARE", help=text)
    return parser


def _exceeded_limits(report: AuditReport, options: argparse.Namespace) -> list[str]:
    """A message for each limit that a report exceeds."""
    leaked = [rows / report.splits[pair.partition("/")[2]] for pair, rows in report.leakage.items()]
    shares = {
        "max_leakage": max(leaked, default=0.0),
        "max_conflicts": report.conflicts["rows"] / report.rows,
        "max_cut": report.lengths.get("tokens", {}).get("share_cut", 0.0),
    }
    messages = [
        f"the {_LIMITS[flag][1]} is {share:.4g}; --{flag} allows {limit:.4g}"
        for flag, share in shares.items()
        if (limit := getattr(options, flag)) is not None and share > limit
    ]
    if report.empty["rows"]:
        messages.append(f"{report.empty['rows']:,} notes are empty")
    if report.unlabelled:
        messages.append(f"{report.unlabelled:,} notes have no label")
    return messages


def _prompt(data: TranscriptionDataModule) -> AlpacaPrompt | None:
    """The prompt, which counts a note's tokens; None, with a warning, if its tokenizer is not available."""
    try:
        return data.prompt
    except UserError as error:
        print(f"medlit: lengths are in words only, because the tokenizer is not available. {error}", file=sys.stderr)
        return None


def _count_tokens(prompt: AlpacaPrompt, transcriptions: list[str]) -> list[int]:
    """Tokens of each transcription, including those that would be cut."""
    template = len(prompt.header) + len(prompt.footer)
    return [len(one.input_ids) - template + one.cut_tokens for one in prompt.prompts(transcriptions)]
