"""Notes -> token ids, once: `datasets` caches the result and maps it into memory afterwards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from medlit.data.cache import cache_folder, cache_key
from medlit.data.prompt import NotePrompt

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 5  # part of the cache key: raise it when the same note gives other ids


def tokenise(rows: Dataset, prompt: NotePrompt, *, cached: bool = True) -> Dataset:
    """Put input_ids (of the prompt), length (their number) and cut_tokens in the place of canonical transcriptions.

    `cached=False` leaves nothing on disk, for a typed note.
    """
    import datasets

    key = cache_key(
        "tokens",
        VERSION,
        prompt.version,
        rows._fingerprint,
        # The whole vocabulary: two tokenizers of one name may differ.
        prompt.tokenizer.backend_tokenizer.to_str(),
        # Its control tokens are no tokens in a note.
        str(prompt.tokenizer.chat_template),
        json.dumps([*prompt.template, prompt.instruction, prompt.max_length, prompt.max_response_tokens]),
    )
    text, number = datasets.Value("string"), datasets.Value("int32")
    named = {"id": text, "specialty": text, "specialties": datasets.List(text), "text_hash": text}
    counted = {"input_ids": datasets.List(number), "length": number, "cut_tokens": number}

    def to_prompts(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        prompts = prompt.prompts(batch["transcription"])
        kept: dict[str, list[object]] = {"text_hash": [""] * len(prompts)}
        kept |= {name: list(batch[name]) for name in named if name in batch}
        kept |= {"input_ids": [p.input_ids for p in prompts], "length": [len(p.input_ids) for p in prompts]}
        return kept | {"cut_tokens": [p.cut_tokens for p in prompts]}

    return rows.map(
        to_prompts,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features(named | counted),
        cache_file_name=str(cache_folder() / f"{key}.arrow") if cached else None,
        load_from_cache_file=cached,
        keep_in_memory=not cached,
        new_fingerprint=key,
        desc="Tokenizing notes",
    )
