"""Fine-tune a language model to file medical transcriptions under their specialty, and know how good it is.

    from medlit import SpecialtyPredictor
    predictor = SpecialtyPredictor.load("logs/quickstart/version_0")
    predictor.predict(["CHIEF COMPLAINT: Blurred vision ..."])

Importing medlit itself imports nothing heavy; the first use of `SpecialtyPredictor` imports Unsloth, which must come
before transformers, and takes some seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medlit.errors import UserError
from medlit.predictions.prediction import Prediction

if TYPE_CHECKING:
    from medlit.predictor import SpecialtyPredictor

__version__ = "0.1.0"
__all__ = ["Prediction", "SpecialtyPredictor", "UserError", "__version__"]


def __getattr__(name: str) -> type[SpecialtyPredictor]:
    """The predictor, when somebody asks for it."""
    if name != "SpecialtyPredictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medlit.__main__ import import_unsloth

    import_unsloth()
    from medlit.predictor import SpecialtyPredictor

    return SpecialtyPredictor
