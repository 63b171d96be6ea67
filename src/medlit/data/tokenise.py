"""Notes -> token ids, once: the result is cached beside the notes by `datasets` and mapped into memory afterwards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from medlit.data.cache import cache_folder, cache_key
from medlit.data.prompt import PROMPT_VERSION, AlpacaPrompt

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 3  # part of the cache's key: raise it when the same note would become other ids


def tokenise(rows: Dataset, prompt: AlpacaPrompt, *, cached: bool = True) -> Dataset:
    """Add the prompt's token ids to canonical notes.

    Args:
        rows: columns id, transcription, specialty and, but for a note that somebody typed, text_hash.
        prompt: builds the prompts; tokenizer, instruction, limits and what is cut are part of the cache's key.
        cached: False leaves nothing on the disk, for a note that somebody typed.

    Returns:
        Columns id, specialty, text_hash, input_ids (prompt), length (tokens of the prompt), cut_tokens; in the order of
        `rows`.
    """
    import datasets

    key = cache_key(
        "tokens",
        VERSION,
        PROMPT_VERSION,
        rows._fingerprint,
        # The whole vocabulary: two tokenizers of one name need not be the same.
        prompt.tokenizer.backend_tokenizer.to_str(),
        json.dumps([prompt.instruction, prompt.max_length, prompt.max_response_tokens]),
    )
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "specialty": datasets.Value("string"),
            "text_hash": datasets.Value("string"),
            "input_ids": datasets.List(datasets.Value("int32")),
            "length": datasets.Value("int32"),
            "cut_tokens": datasets.Value("int32"),
        }
    )

    def ask(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        prompts = prompt.prompts(batch["transcription"])
        return {
            "id": list(batch["id"]),
            "specialty": list(batch["specialty"]),
            "text_hash": list(batch.get("text_hash", [""] * len(batch["id"]))),
            "input_ids": [p.input_ids for p in prompts],
            "length": [len(p.input_ids) for p in prompts],
            "cut_tokens": [p.cut_tokens for p in prompts],
        }

    return rows.map(
        ask,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        cache_file_name=str(cache_folder() / f"{key}.arrow") if cached else None,
        load_from_cache_file=cached,
        keep_in_memory=not cached,
        new_fingerprint=key,
        desc="Tokenizing notes",
    )
