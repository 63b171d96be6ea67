"""Fine-tune a language model to classify medical transcriptions by specialty, and evaluate it.

    run = medlit.fit("configs/quickstart.yaml", trainer__max_steps=60)
    run.test().metrics["accuracy"]
    predictor = medlit.SpecialtyPredictor.load(run.adapter)
    predictor.predict(["CHIEF COMPLAINT: Blurred vision ..."])

Importing medlit itself imports nothing heavy; the first use of `fit`, `datamodule` or `SpecialtyPredictor` imports
Unsloth, which must come before transformers, and takes some seconds.
"""

from typing import TYPE_CHECKING, Any

from medlit.paths import __version__

if TYPE_CHECKING:
    from medlit.cli.cli import datamodule, fit
    from medlit.errors import UserError
    from medlit.predictions.table import Prediction
    from medlit.predictor import SpecialtyPredictor

__all__ = ["Prediction", "SpecialtyPredictor", "UserError", "__version__", "datamodule", "fit"]

_MODULES = {"Prediction": "predictions.table", "SpecialtyPredictor": "predictor", "UserError": "errors"}
_MODULES |= {"datamodule": "cli.cli", "fit": "cli.cli"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name is of
    """Import a public name on first use."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("SpecialtyPredictor", "datamodule", "fit"):
        import_module("medlit.unsloth_first").import_unsloth()
    return getattr(import_module(f"medlit.{_MODULES[name]}"), name)
