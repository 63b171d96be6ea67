"""The parser of every verb's settings: jsonargparse's, whose complaints come without pages of usage."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from medlit.cli.help import HelpFormatter

# How a flag and a key of a YAML that are not there are told.
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)")


class Parser(LightningArgumentParser):
    """Says in one line what it did not understand; the manual is a command away.

    Args:
        kwargs: as for Lightning's.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - jsonargparse's
        super().__init__(**{"formatter_class": HelpFormatter} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2, or raise where the caller asked for an exception."""
        if not self.exit_on_error:
            super().error(message, ex)
        said = " ".join(message.split()).rstrip(".")
        if (unknown := _UNKNOWN.search(said)) and (near := difflib.get_close_matches(unknown[1], set(names(self)), 1)):
            said += f"; did you mean {near[0]}?"
        else:
            said += ";"
        print(f"medlit: {said} '--help' after the verb explains every setting.", file=sys.stderr)
        raise SystemExit(2) from ex


def names(parser: LightningArgumentParser) -> Iterator[str]:
    """Every setting of a parser and of its verbs, in dots: 'model.lora.r'."""
    for action in parser._actions:
        yield from (option.removeprefix("--") for option in action.option_strings)
        if isinstance(action.choices, dict):
            for verb in action.choices.values():
                yield from names(verb)
