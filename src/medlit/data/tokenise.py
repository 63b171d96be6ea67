"""Notes -> token ids, once: `datasets` caches the result and maps it into memory afterwards."""

import json

import datasets

from medlit.data.cache import cache_folder, cache_key
from medlit.data.prompt import NotePrompt
from medlit.errors import report_if_slow


def tokenise(rows: datasets.Dataset, prompt: NotePrompt, *, cached: bool = True) -> datasets.Dataset:
    """Put input_ids (of the prompt), length (their number) and cut_tokens in the place of canonical transcriptions.

    `cached=False` leaves nothing on disk, for a typed note.
    """
    key = cache_key(
        "tokens",
        prompt.version,
        rows._fingerprint,
        # The whole vocabulary: two tokenizers of one name may differ.
        prompt.tokenizer.backend_tokenizer.to_str(),
        str(prompt.tokenizer.chat_template),  # whose control tokens are no tokens in a note
        json.dumps([*prompt.template, prompt.instruction, prompt.max_length, prompt.max_response_tokens]),
    )
    number = datasets.Value("int32")
    counted = {"input_ids": datasets.List(number), "length": number, "cut_tokens": number}
    kept = {name: kind for name, kind in rows.features.items() if name != "transcription"}

    def to_prompts(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        values = [(p.input_ids, len(p.input_ids), p.cut_tokens) for p in prompt.prompts(batch["transcription"])]
        return dict(zip(counted, map(list, zip(*values, strict=True)), strict=True))

    with report_if_slow(f"tokenising {len(rows):,} notes", has_bar=True):
        return rows.map(
            to_prompts,
            batched=True,
            remove_columns=["transcription"],
            features=datasets.Features(kept | counted),
            cache_file_name=str(cache_folder() / f"{key}.arrow") if cached else None,
            load_from_cache_file=cached,
            keep_in_memory=not cached,
            new_fingerprint=key,
            desc="Tokenizing notes",
        )
