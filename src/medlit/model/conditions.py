"""Under what limits and number formats an adapter was measured: kept in its `medlit.json`, to answer alike elsewhere.

Nothing is refused for them, unlike for what `structure.py` keeps: another limit or format changes an answer a little,
or none at all. A config states its own; who has no config (`SpecialtyPredictor`) takes these.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from medlit.errors import UserError
from medlit.model.settings import LanguageModel

KEY = "conditions"
_DTYPES = get_args(get_type_hints(LanguageModel)["dtype"])


@dataclass(frozen=True)
class Conditions:
    """The settings besides an adapter's structure that its answers depend on.

    Attributes:
        max_length: most tokens of prompt and answer together.
        max_response_tokens: of these, tokens that are kept for the answer.
        load_in_4bit: whether the frozen weights are held in bitsandbytes NF4.
        dtype: number format of the frozen computation.
    """

    max_length: int
    max_response_tokens: int
    load_in_4bit: bool
    dtype: Literal["auto", "bfloat16", "float16", "float32"]

    @classmethod
    def of(cls, language_model: LanguageModel, max_response_tokens: int) -> Conditions:
        """The conditions of a run."""
        return cls(language_model.max_length, max_response_tokens, language_model.load_in_4bit, language_model.dtype)

    @classmethod
    def read(cls, file: Path) -> Conditions | None:
        """Read them beside an adapter's weights; None where a version of medlit wrote the file that kept none.

        Raises:
            UserError: they are damaged.
        """
        values = json.loads(file.read_text(encoding="utf-8")).get(KEY)
        if values is None:
            return None
        try:
            read = cls(**values)
        except TypeError as error:
            raise _damaged(file) from error
        counts = (read.max_length, read.max_response_tokens)
        typed = all(type(count) is int and count > 0 for count in counts) and type(read.load_in_4bit) is bool
        if not typed or read.dtype not in _DTYPES:
            raise _damaged(file)
        return read

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def _damaged(file: Path) -> UserError:
    return UserError(f"model.adapter: the {KEY} in {file} are damaged; copy the adapter's folder again.")
