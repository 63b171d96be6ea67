"""Number types with bounds, for the annotations of settings: the parser checks them and `--help` shows them.

jsonargparse's own `PositiveInt` and the like parse to subclasses of int and float. Those would end up in checkpoints,
which torch then refuses to load with `weights_only=True`; the types here parse to plain numbers.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from jsonargparse.typing import register_type


def _bounded(name: str, base: type[int] | type[float], words: str, fits: Callable[[float], bool]) -> type:
    """Register a type with jsonargparse; its docstring is what a value must be, in words."""

    def parse(value: Any) -> float:  # noqa: ANN401 - of a YAML or a flag
        try:
            number = base(value)
            if not isinstance(value, bool) and number == float(value) and fits(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(f"Got value: {value}")  # as jsonargparse reports other types

    bounded = type(name, (), {"__doc__": words})
    register_type(bounded, base, parse, type_check=lambda value, _: type(value) is base and fits(value))
    return bounded


if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveNumber: TypeAlias = float
    NonNegativeNumber: TypeAlias = float
    Probability: TypeAlias = float
    DropoutRate: TypeAlias = float
else:
    PositiveInt = _bounded("PositiveCount", int, "an integer of at least 1", lambda x: x >= 1)
    NonNegativeInt = _bounded("Count", int, "an integer of at least 0", lambda x: x >= 0)
    PositiveNumber = _bounded("PositiveNumber", float, "a number over 0", lambda x: 0 < x < math.inf)
    NonNegativeNumber = _bounded("NonNegativeNumber", float, "a number of at least 0", lambda x: 0 <= x < math.inf)
    Probability = _bounded("Probability", float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    DropoutRate = _bounded("DropoutRate", float, "a number from 0 to under 1", lambda x: 0 <= x < 1)
