"""The parser of every verb's settings: jsonargparse's, whose complaints come without pages of usage."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from medlit.manual import Manual


class Parser(LightningArgumentParser):
    """Says in one line what it did not understand; the manual is a command away.

    Args:
        kwargs: as for Lightning's.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - jsonargparse's
        super().__init__(**{"formatter_class": Manual} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2, or raise where the caller asked for an exception."""
        if not self.exit_on_error:
            super().error(message, ex)
        said = " ".join(message.split()).rstrip(".")
        print(f"medlit: {said}; '--help' after the verb explains every setting.", file=sys.stderr)
        raise SystemExit(2) from ex
