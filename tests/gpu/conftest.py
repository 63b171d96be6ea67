"""An 8B Llama of the right shape with random weights, and notes as long as real ones, on a machine with no network.

`LLAMA_TOKENIZER` names a folder with Llama 3.1's tokenizer.json, `NOTES_TABLE` a table of notes to take instead.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from shapes import CUT, MEDIAN, SIGMA, write_llama_8b

CONFIG = Path(__file__).parents[2] / "configs" / "llama31_8b.yaml"
TOKENS_A_WORD = 1.4


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_8b(tmp_path_factory.mktemp("llama-8b"))


@pytest.fixture(scope="session")
def long_notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "NOTES_TABLE" in os.environ:
        return Path(os.environ["NOTES_TABLE"])
    from builtin_notes import builtin_notes

    rows = builtin_notes(train=400, validation=1, test=1)["train"]
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    with path.open("w") as file:
        for row in rows:
            words = int(min(CUT, draw.lognormvariate(MEDIAN, SIGMA)) / TOKENS_A_WORD)
            text = (row["transcription"] + " ") * (1 + words // len(row["transcription"].split()))
            file.write(json.dumps({**row, "transcription": " ".join(text.split()[:words])}) + "\n")
    return path


@pytest.fixture(scope="session")
def main_job(llama_8b: Path, long_notes: Path) -> list[str]:
    """Flags of the recipe's config on that model and those notes."""
    return [
        "--config",
        str(CONFIG),
        "--model.language_model.base_model",
        str(llama_8b),
        "--data.source",
        str(long_notes),
    ]
