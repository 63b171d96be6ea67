"""`medlit audit`: what can be wrong with the notes, told before they are trained on.

It reads the notes as they are, before anything is split or left out, and prints duplicates, conflicts, leakage between
splits, balance, lengths and columns that give the label away: counts and row ids, never a note. Reading a Hub dataset
here fills the cache that later runs use offline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.atomic_io import atomic_write, write_json
from medlit.data.audit import audit
from medlit.errors import UserError
from medlit.tools.audit.figure import audit_figure
from medlit.tools.audit.limits import add_limits, passed_limits
from medlit.tools.audit.show import show

if TYPE_CHECKING:
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.prompt import AlpacaPrompt

_ABOUT = "W" + __doc__.partition(": w")[2]
PASSED = 3  # exit code when a limit is passed

_USAGE = "medlit audit [--config FILE ...] [--data.KEY VALUE ...] [--output DIR] [--strict] [limits]"
_EXAMPLES = """
examples:
  medlit audit --data.source notes.csv --data.columns.label department --output audit
  medlit audit --config configs/llama31_8b.yaml --strict --max_conflicts 0.02
"""
_SETTINGS = """\
settings, the same as of 'medlit fit' (whose --help explains all of them):
  --config FILE         a config; several are layered, and only what it says of data and base model counts
  --data.source SOURCE  'builtin', a file, a folder, a glob or a Hub dataset id
  --data.columns.text NAME, --data.columns.label NAME, --data.columns.id NAME
                        the columns that hold note, specialty and id
  --data.split.near_threshold SHARE
                        from which Jaccard similarity on notes count as nearly the same (0.8 if left out, and then of at
                        most 50,000 notes: comparing takes a minute for every 40,000)
  --model.language_model.base_model MODEL
                        whose tokenizer counts tokens; lengths are in words alone where it is not to be had

exit code: 0; 3 when --strict is given and a limit is passed; 2 after a mistake in the settings or the notes.
"""


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
        usage=_USAGE,
        description=_ABOUT + _EXAMPLES,
        epilog=_SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write audit.json and audit.png to")
    parser.add_argument("--strict", action="store_true", help=f"exit with code {PASSED} when a limit is passed")
    add_limits(parser)
    options, rest = parser.parse_known_args(args)
    # After --help: these imports take seconds.
    from medlit.cli.arguments import make_datamodule, parse_settings
    from medlit.cli.environment import check_writable

    if options.output is not None:
        check_writable("output", options.output / "audit.json")
    data = make_datamodule(parse_settings("audit", rest))
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
        write_json(options.output / "audit.json", found.report.as_dict() | {"over_limits": passed})
        with atomic_write(options.output / "audit.png") as path:
            audit_figure(found).savefig(path, dpi=110)
        print(f"written: {options.output / 'audit.json'}, {options.output / 'audit.png'}")
    return PASSED if passed and options.strict else 0


def _prompt(data: TranscriptionDataModule) -> AlpacaPrompt | None:
    """The prompt that knows the tokens of a note; None, and a word about it, where its tokenizer is not to be had."""
    try:
        return data.prompt
    except UserError as error:
        print(f"medlit: lengths are in words alone, since the tokenizer is not to be had. {error}", file=sys.stderr)
        return None


def _count_tokens(prompt: AlpacaPrompt, transcriptions: list[str]) -> list[int]:
    """Tokens of each transcription, those that would be cut included."""
    template = len(prompt.header) + len(prompt.footer)
    return [len(one.input_ids) - template + one.cut_tokens for one in prompt.prompts(transcriptions)]
