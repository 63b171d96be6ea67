"""Answers: greedy, the same in company as alone, over at any EOS, read strictly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import BONE, BRAIN, SPECIALTIES, notes
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokens

from medlit.data.batches import Collator, Prompts, Row
from medlit.labels import LabelSet
from medlit.model import backbone as language_model
from medlit.model.decoding import Answers, eos_ids, generate
from medlit.model.settings import Backbone, Lora
from medlit.prompts import AlpacaPrompt
from medlit.weights import load_tokenizer

LABELS = LabelSet.from_names(SPECIALTIES)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Tokens:
    return load_tokenizer(str(llama))


@pytest.fixture(scope="module")
def model(llama: Path) -> nn.Module:
    """The tiny model ready to answer, with an adapter that does something."""
    model = language_model.load(Backbone(str(llama), max_length=512), Lora(), torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    language_model.answer_mode(model)
    return model


def prompts(tokenizer: Tokens, texts: list[str]) -> Prompts:
    asked = AlpacaPrompt(tokenizer, max_length=512).prompts(texts)
    rows = [
        Row(row=i, id=str(i), input_ids=prompt.input_ids, cut_tokens=0, specialty=None)
        for i, prompt in enumerate(asked)
    ]
    return Collator(lambda name: [], tokenizer.pad_token_id, "response").prompts(rows)


def answer(model: Any, tokenizer: Tokens, asked: Prompts, tokens: int = 12) -> Answers:  # noqa: ANN401
    return generate(model, tokenizer, asked, LABELS, tokens)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Notes of many lengths, from one word to one that is several times the others."""
    return ["Pain.", *(row["transcription"] for row in notes()["train"][:9])]


# --- with the real model ----------------------------------------------------------------------------------------------


def test_a_batch_answers_as_each_note_alone(model: nn.Module, tokenizer: Tokens, texts: list[str]) -> None:
    together = answer(model, tokenizer, prompts(tokenizer, texts))
    alone = [answer(model, tokenizer, prompts(tokenizer, [text])) for text in texts]
    assert together.texts == [one.texts[0] for one in alone]
    assert together.label_ids.tolist() == [one.label_ids.item() for one in alone]
    assert len(set(together.texts)) > len(texts) // 2, "the answers hang on the notes"


def test_padding_on_the_left_has_no_effect(model: nn.Module, tokenizer: Tokens, texts: list[str]) -> None:
    asked = prompts(tokenizer, texts)
    gap = torch.zeros(len(texts), 23, dtype=torch.long)
    padded = asked._replace(
        input_ids=torch.cat([gap + tokenizer.pad_token_id, asked.input_ids], dim=1),
        attention_mask=torch.cat([gap, asked.attention_mask], dim=1),
    )
    assert answer(model, tokenizer, padded).texts == answer(model, tokenizer, asked).texts


def test_a_sampling_model_is_greedy_all_the_same(
    model: nn.Module,
    tokenizer: Tokens,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = prompts(tokenizer, texts)
    greedy = answer(model, tokenizer, asked).texts
    config = language_model.causal_lm(model).generation_config
    for name, value in {"do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.9}.items():
        monkeypatch.setattr(config, name, value)
    assert answer(model, tokenizer, asked).texts == greedy


def test_it_is_what_the_likeliest_next_token_gives(model: nn.Module, tokenizer: Tokens, texts: list[str]) -> None:
    asked = prompts(tokenizer, texts[:1])
    ids = asked.input_ids
    for _ in range(12):
        with torch.no_grad():
            logits = language_model.causal_lm(model)(input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    new = ids[0, asked.input_ids.shape[1] :]
    assert answer(model, tokenizer, asked).texts == [tokenizer.decode(new, skip_special_tokens=True)]


def test_it_stops_at_every_end(
    model: nn.Module,
    tokenizer: Tokens,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever token the model happens to give as its third is made an EOS, for two notes at once."""
    asked = prompts(tokenizer, texts)
    with torch.no_grad():
        out = model.generate(
            input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=12, do_sample=False
        )
    free = out[:, asked.input_ids.shape[1] :].tolist()
    ends = [free[0][2], free[1][2]]
    assert ends[0] != ends[1]
    monkeypatch.setattr(language_model.causal_lm(model).generation_config, "eos_token_id", ends)
    first_end = [next((i for i, t in enumerate(row) if t in [*ends, tokenizer.eos_token_id]), 12) for row in free]
    wanted = [tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(free, first_end, strict=True)]
    assert answer(model, tokenizer, asked).texts == wanted
    assert first_end[0] <= 2
    assert first_end[1] <= 2


# --- reading an answer ------------------------------------------------------------------------------------------------


class Script(nn.Module):
    """A model that gives the answers it was told to give.

    Args:
        answers: token ids of each row's answer, all of one length.
        ends: EOS ids of its generation config.
    """

    def __init__(self, answers: list[list[int]], ends: int | list[int] | None) -> None:
        super().__init__()
        self.answers = torch.tensor(answers)
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.asked_for: dict[str, Any] = {}

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - as many as transformers has
        self.asked_for = options
        return torch.cat([input_ids, self.answers], dim=1)


def scripted(tokenizer: Tokens, answers: list[str], ends: int | list[int] | None = None) -> Script:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    width = max(map(len, rows))
    return Script([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], ends)


def test_the_first_line_counts_if_it_is_on_the_list(tokenizer: Tokens) -> None:
    answers = {
        f"{BRAIN}</s>": LABELS.names.index(BRAIN),
        f"  {BONE.upper()}</s>": LABELS.names.index(BONE),
        f"{BONE}\n\n### Instruction:\n{BRAIN}</s>": LABELS.names.index(BONE),
        f"{BONE} or {BRAIN}</s>": LABELS.invalid,
        f"The answer is {BONE}</s>": LABELS.invalid,
        "</s>": LABELS.invalid,
        BRAIN: LABELS.names.index(BRAIN),
    }
    model = scripted(tokenizer, list(answers))
    found = answer(model, tokenizer, prompts(tokenizer, ["A note."] * len(answers)))
    assert found.label_ids.tolist() == list(answers.values())
    assert found.label_ids.dtype == torch.int64
    assert found.texts == [text.removesuffix("</s>") for text in answers]


def test_nothing_after_any_end_is_read(tokenizer: Tokens) -> None:
    other = tokenizer(":", add_special_tokens=False)["input_ids"]
    answers = [f"{BRAIN}</s> and more", f"{BRAIN}: and more"]
    found = answer(scripted(tokenizer, answers, other), tokenizer, prompts(tokenizer, ["A note."] * 2))
    assert found.texts == [BRAIN, BRAIN]


def test_the_model_is_told_all_that_it_must_be(tokenizer: Tokens) -> None:
    model = scripted(tokenizer, [BRAIN, BONE], [5, 2])
    asked = prompts(tokenizer, ["A note.", "A longer note."])
    answer(model, tokenizer, asked, tokens=7)
    assert torch.equal(model.asked_for["attention_mask"], asked.attention_mask)
    assert model.asked_for["do_sample"] is False
    assert model.asked_for["max_new_tokens"] == 7
    assert model.asked_for["pad_token_id"] == tokenizer.pad_token_id
    assert model.asked_for["eos_token_id"] == [2, 5]


@pytest.mark.parametrize(("configured", "ends"), [(None, [2]), (7, [2, 7]), ([7, 2, 9], [2, 7, 9])])
def test_every_end_is_known(tokenizer: Tokens, configured: int | list[int] | None, ends: list[int]) -> None:
    assert tokenizer.eos_token_id == 2
    assert eos_ids(Script([[0]], configured), tokenizer) == ends
