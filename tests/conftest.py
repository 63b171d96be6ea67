"""What every test stands on: caches of its own, no network, and the tiny model with its notes.

`import unsloth` takes ten seconds and is done once, by the first test that needs a model.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

# Read when these libraries are imported, so set before any test module is.
_CACHE = Path(tempfile.mkdtemp(prefix="medlit-tests-"))
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("MEDLIT_")]:
    del os.environ[_name]
os.environ |= {
    "MEDLIT_CACHE": str(_CACHE / "medlit"),
    "HF_HOME": str(_CACHE / "huggingface"),
    "HF_DATASETS_CACHE": str(_CACHE / "datasets"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from fakes import write_llama, write_notes  # noqa: E402

from medlit.__main__ import import_unsloth  # noqa: E402

Medlit = Callable[..., Path]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model, with Unsloth imported."""
    import_unsloth()
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def notes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the forty notes, one CSV file a split."""
    return write_notes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, llama: Path, notes_folder: Path) -> Path:
    """A config of the tiny model and the forty notes: 11 steps of 8 notes in 2 micro-batches, validated every 4."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "max_steps": 11,
                    "num_sanity_val_steps": 0,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                },
                "val_every_steps": 4,
                "model": {
                    "backbone": {"base_model": str(llama), "max_length": 112, "gradient_checkpointing": "off"},
                    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 0},
                    "decoding": {"max_new_tokens": 8},
                },
                "data": {
                    "source": str(notes_folder),
                    "response_tokens": 8,
                    "examples_per_step": 8,
                    "batch_size": 4,
                    "eval_batch_size": 4,
                },
            }
        )
    )
    return path
