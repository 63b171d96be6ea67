"""Notes are tokenized once, and again only if the result would differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from fake_tokenizers import byte_tokenizer

from medlit.data.prompt import AlpacaPrompt, ChatPrompt, Prompt
from medlit.data.tokenise import tokenise

PROMPT = AlpacaPrompt(byte_tokenizer(), max_length=512)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every note that was tokenized."""
    notes: list[str] = []
    prompts = AlpacaPrompt.prompts

    def count(self: AlpacaPrompt, transcriptions: Sequence[str]) -> list[Prompt]:
        notes.extend(transcriptions)
        return prompts(self, transcriptions)

    monkeypatch.setattr(AlpacaPrompt, "prompts", count)
    return notes


def rows(notes: Sequence[str] = ("A note.", "Another. " * 90, "Third.")) -> datasets.Dataset:
    columns = {"id": list("abcdefgh")[: len(notes)], "transcription": list(notes), "specialty": [None] * len(notes)}
    columns["text_hash"] = [""] * len(notes)
    text = datasets.Value("string")
    features = datasets.Features(dict.fromkeys(columns, text) | {"specialties": datasets.List(text)})
    return datasets.Dataset.from_dict(columns | {"specialties": [[]] * len(notes)}, features=features)


def test_every_note_is_its_prompt_in_order() -> None:
    tokens = tokenise(rows(), PROMPT)
    columns = ["cut_tokens", "id", "input_ids", "length", "specialties", "specialty", "text_hash"]
    assert sorted(tokens.column_names) == columns
    assert tokens["id"][:] == ["a", "b", "c"]
    assert tokens["specialty"][:] == [None] * 3
    for note, row in zip(rows()["transcription"], tokens, strict=True):
        prompt = PROMPT.prompt(note)
        assert row["input_ids"] == prompt.input_ids
        assert row["length"] == len(prompt.input_ids)
        assert row["cut_tokens"] == prompt.cut_tokens
    assert tokens["cut_tokens"][0] == 0 < tokens["cut_tokens"][1]


def test_the_second_start_tokenizes_nothing(tokenized: list[str]) -> None:
    first = tokenise(rows(), PROMPT)
    assert len(tokenized) == 3
    second = tokenise(rows(), AlpacaPrompt(byte_tokenizer(), max_length=512))
    assert len(tokenized) == 3
    assert second[:] == first[:]
    assert second._fingerprint == first._fingerprint


@pytest.mark.parametrize(
    "other",
    [
        replace(PROMPT, tokenizer=byte_tokenizer(bos=False)),
        replace(PROMPT, instruction="Which specialty?"),
        replace(PROMPT, max_length=511),
        replace(PROMPT, max_response_tokens=31),
    ],
    ids=["tokenizer", "instruction", "limit", "room for the answer"],
)
def test_settings_that_change_the_ids_tokenize_again(tokenized: list[str], other: AlpacaPrompt) -> None:
    first = tokenise(rows(), PROMPT)
    second = tokenise(rows(), other)
    assert len(tokenized) == 6
    assert second[:] != first[:]


def test_formats_and_templates_of_chats_tokenize_again(tokenized: list[str]) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    kinds = [AlpacaPrompt(tokenizer), ChatPrompt(tokenizer), ChatPrompt(other)]
    tables = [tokenise(rows(), prompt) for prompt in kinds + kinds]
    assert len({table._fingerprint for table in tables}) == len(kinds)
    assert [table[0]["input_ids"] for table in tables] == [p.prompt("A note.").input_ids for p in kinds + kinds]


def test_other_notes_are_tokenized(tokenized: list[str]) -> None:
    tokenise(rows(), PROMPT)
    tokenise(rows(["A note.", "Another."]), PROMPT)
    assert len(tokenized) == 5


def test_an_uncached_note_leaves_no_file(tmp_path: Path) -> None:
    assert tokenise(rows(["A note."]), PROMPT, cached=False)[:] == tokenise(rows(["A note."]), PROMPT)[:]
    kept = sorted(tmp_path.rglob("*.arrow"))
    tokenise(rows(["A secret."]), PROMPT, cached=False)
    assert sorted(tmp_path.rglob("*.arrow")) == kept
