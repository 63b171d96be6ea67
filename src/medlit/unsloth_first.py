"""Import Unsloth before transformers.

`import lightning` imports transformers, and Unsloth patches less if it comes second. The import takes ten seconds.
"""

import contextlib
import importlib
import os
import sys
import warnings

from medlit.paths import cache_dir

TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"


def import_unsloth() -> None:
    """Import Unsloth with its usage statistics off and its compiled code in medlit's cache."""
    # Statistics would be sent over the network; the compile cache would be written into the working folder.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    threads = os.environ.get(TOKENIZERS_PARALLELISM)
    # Unsloth prints a greeting, and standard output is for answers.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("unsloth")
    if threads is None:  # Unsloth switches them off; notes are tokenised on all cores
        os.environ.pop(TOKENIZERS_PARALLELISM, None)
