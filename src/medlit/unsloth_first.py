"""Import Unsloth before transformers, and see transformers as it is without Unsloth.

`import lightning` imports transformers, and Unsloth patches less if it comes second. The import takes ten seconds.
"""

import contextlib
import importlib.util
import inspect
import io
import logging
import os
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import Any

from medlit.paths import cache_dir

TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"
_STOCK, _MASKS = "_stock_", "transformers.masking_utils"


def import_unsloth() -> None:
    """Import Unsloth with its usage statistics off and its compiled code in medlit's cache."""
    # Statistics would be sent over the network; the compile cache would be written into the working folder.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():  # in a log, the bars of downloads and of loading are lines without end
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # On a CPU bitsandbytes recommends a package that downloads kernels from the Hub; medlit does not need it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    threads = os.environ.get(TOKENIZERS_PARALLELISM)
    # Unsloth prints a greeting and warnings; what prevents its use is raised.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("unsloth")
    if threads is None:  # Unsloth switches them off; notes are tokenised on all cores
        os.environ.pop(TOKENIZERS_PARALLELISM, None)


def stock_class(model_class: Any) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """A part's class as in transformers' files, which Unsloth patches on a GPU; another library's as it is."""
    modules = (each.__module__ for each in model_class.__mro__)
    name = next((n for n in modules if n.startswith("transformers.models.") and _STOCK not in n), None)
    return getattr(_stock_module(name), model_class.__name__, model_class) if name else model_class


@cache
def _stock_module(name: str) -> ModuleType:
    """A module of transformers executed again from its file, with masks from such a module too."""
    # Under another name in the same package, so that relative imports work and the patched module stays as it is.
    package, _, own_name = name.rpartition(".")
    spec = importlib.util.spec_from_file_location(f"{package}.{_STOCK}{own_name}", inspect.getfile(sys.modules[name]))
    stock = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[stock.__name__] = stock  # where decorators look up a class's file
    spec.loader.exec_module(stock)  # type: ignore[union-attr]
    if name != _MASKS:
        patched, masks = vars(sys.modules[_MASKS]), vars(_stock_module(_MASKS))
        vars(stock).update({n: masks[n] for n, value in vars(stock).items() if n in masks and value is patched.get(n)})
    return stock
