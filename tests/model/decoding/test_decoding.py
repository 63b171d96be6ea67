"""Answers: three ways that agree where they must, the same in company as alone, beside a full forward a label."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_families import FAMILIES, tokenizer_of
from fake_tokenizers import byte_tokenizer
from fakes import BONE, BRAIN, SPECIALTIES, notes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokens

from medlit.base_model import load_tokenizer
from medlit.data.collate import Collator, Prompts, TokenisedNote, unnamed_rows
from medlit.data.labels import LabelSet
from medlit.data.prompt import AlpacaPrompt, ChatPrompt
from medlit.errors import UserError
from medlit.model.decoding import Answers, Decoder, Generate, LabelScorer, make_decoder
from medlit.model.decoding.generate import eos_ids
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import causal_lm
from medlit.model.language_model import inference_mode, loss_sum
from medlit.model.loading import load_model
from medlit.model.settings import Decoding, LanguageModel, Lora

LABELS = LabelSet.from_names([*SPECIALTIES, "Neurosurgery", "Neurology - Pediatric", "Bone"])
CPU = torch.device("cpu")
MODES = ("generate", "constrained", "likelihood")


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Tokens:
    return load_tokenizer(str(llama))


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokens) -> AlpacaPrompt:
    return AlpacaPrompt(tokenizer, max_length=512)


@pytest.fixture(scope="module")
def model(llama: Path) -> nn.Module:
    """The tiny model ready to answer, with an adapter that does something."""
    model = load_model(LanguageModel(str(llama), max_length=512), Lora(), CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    inference_mode(model)
    return model


def ask(prompt: AlpacaPrompt, texts: list[str]) -> Prompts:
    return Collator(lambda name: [], prompt.tokenizer.pad_token_id).prompts(unnamed_rows(prompt.prompts(texts)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Notes of many lengths, from one word to one that is several times the others."""
    return ["Pain.", *(row["transcription"] for row in notes()["train"][:9])]


@pytest.fixture(scope="module")
def decoder(model: nn.Module, prompt: AlpacaPrompt) -> Callable[..., Decoder]:
    def decoder(mode: Any, labels: LabelSet = LABELS, **given: Any) -> Decoder:  # noqa: ANN401
        given = {"max_new_tokens": 12, "stop_early": False, **given}
        return make_decoder(Decoding(mode, **given), model, prompt, labels)

    return decoder


Make = Callable[..., Decoder]


def next_scores(model: nn.Module, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token by a separate forward, float64, of a model whose weights do not change."""
    return _next_scores(model, tuple(ids))


@functools.cache
def _next_scores(model: nn.Module, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        scores = causal_lm(model)(input_ids=torch.tensor([ids])).logits[0, -1]
    return scores.double().log_softmax(dim=0)


def one_by_one(model: nn.Module, prompt: AlpacaPrompt, text: str, labels: LabelSet) -> list[list[float]]:
    """Log-probability of every token of every label, each token by a separate forward."""
    asked = prompt.prompt(text).input_ids
    answers = [prompt.response(name) for name in labels]
    return [
        [float(next_scores(model, asked + answer[:i])[token]) for i, token in enumerate(answer)] for answer in answers
    ]


# --- all three --------------------------------------------------------------------------------------------------------


def same(ours: Answers, theirs: Answers) -> None:
    assert ours.texts == theirs.texts
    assert torch.equal(ours.label_ids, theirs.label_ids)
    if ours.probabilities is not None:
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.log_likelihoods, theirs.log_likelihoods, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_answers_as_each_note_alone(decoder: Make, prompt: AlpacaPrompt, texts: list[str], mode: str) -> None:
    together = decoder(mode)(ask(prompt, texts))
    alone = [decoder(mode)(ask(prompt, [text])) for text in texts]
    joined = [None if parts[0] is None else torch.cat(parts) for parts in list(zip(*alone, strict=True))[2:]]
    same(together, Answers(torch.cat([one.label_ids for one in alone]), [one.texts[0] for one in alone], *joined))
    assert together.label_ids.dtype == torch.int64
    assert len(set(together.texts)) > 1, "the answers hang on the notes"


@pytest.mark.parametrize("mode", MODES)
def test_padding_on_the_left_has_no_effect(decoder: Make, prompt: AlpacaPrompt, texts: list[str], mode: str) -> None:
    asked = ask(prompt, texts)
    gap = torch.zeros(len(texts), 23, dtype=torch.long)
    padded = asked._replace(
        input_ids=torch.cat([gap + prompt.tokenizer.pad_token_id, asked.input_ids], dim=1),
        attention_mask=torch.cat([gap, asked.attention_mask], dim=1),
    )
    same(decoder(mode)(padded), decoder(mode)(asked))


def test_a_label_with_more_than_half_the_probability_is_every_mode_s_answer(llama: Path, prompt: AlpacaPrompt) -> None:
    """More than one half for the whole is more than one half for each token: no other way to answer has a chance."""
    labels = LabelSet.from_names(SPECIALTIES)
    model = taught(llama, prompt)
    asked = ask(prompt, [row["transcription"] for row in notes()["test"]])
    answers = [
        make_decoder(Decoding(mode, stop_early=early), model, prompt, labels)(asked)  # type: ignore[arg-type]
        for mode, early in [("likelihood", True), ("constrained", True), ("generate", True), ("generate", False)]
    ]
    likelihoods = answers[0].log_likelihoods
    assert likelihoods is not None
    sure = likelihoods.max(dim=1).values > math.log(0.5)
    assert sure.sum() >= 4
    for found in answers:
        assert found.label_ids[sure].tolist() == likelihoods.argmax(dim=1)[sure].tolist()


def taught(llama: Path, prompt: AlpacaPrompt) -> nn.Module:
    """The tiny model after some steps on the training notes."""
    model = load_model(LanguageModel(str(llama), max_length=512), Lora(), CPU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    rows = [
        TokenisedNote(
            row=i,
            id=str(i),
            text_hash="",
            input_ids=one.input_ids,
            cut_tokens=0,
            specialty=note["medical_specialty"],
        )
        for i, note in enumerate(notes()["train"][3:])
        for one in [prompt.prompt(note["transcription"])]
    ]
    batch = Collator(prompt.response, prompt.tokenizer.pad_token_id).train(rows, len(rows))
    for _ in range(25):
        (loss_sum(model, batch) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    inference_mode(model)
    return model


def test_a_free_answer_that_stays_on_the_trie_is_the_constrained_one(prompt: AlpacaPrompt) -> None:
    model = scripted(prompt.tokenizer, [f"{name}</s>" for name in LABELS])
    asked = ask(prompt, ["A note."] * len(LABELS))
    for mode in MODES:
        found = make_decoder(Decoding(mode), model, prompt, LABELS)(asked)  # type: ignore[arg-type]
        assert found.label_ids.tolist() == list(range(len(LABELS))), mode
        assert found.texts == list(LABELS)


def test_no_pass_is_wider_than_the_prompts(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many labels there are; and the head never runs at all of a prompt's tokens."""
    labels = LabelSet.from_names([f"{a}{b} {c}" for a in "abcd" for b in "efgh" for c in "ijklmnop"])
    asked = ask(prompt, ["Pain.", "Heart pain for two weeks."])
    widths, rows = [], []
    inner = causal_lm(model)
    forward = inner.model.forward

    def watch(*args: Any, **given: Any) -> Any:  # noqa: ANN401
        widths.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(inner.model, "forward", watch)
    handle = inner.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].numel() // 64))
    found = decoder("likelihood", labels)(asked)
    handle.remove()
    monkeypatch.undo()
    assert max(widths) == widths[0] == asked.input_ids.shape[1]
    assert len(widths) > 2, "the labels took several passes"
    assert max(rows) <= 512
    some = [3, 64, 127]
    wanted = one_by_one(model, prompt, "Pain.", LabelSet(tuple(labels.names[i] for i in some)))
    assert found.log_likelihoods is not None
    assert found.log_likelihoods[0, some].tolist() == pytest.approx([sum(tokens) for tokens in wanted], abs=1e-4)


@pytest.mark.parametrize("mode", ["constrained", "likelihood"])
def test_a_note_whose_numbers_overflow_is_named(
    decoder: Make, prompt: AlpacaPrompt, texts: list[str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with some models in float16: the first label would be the answer, with NaN for a probability."""
    asked = ask(prompt, texts[:3])

    def overflowing(model: nn.Module, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), causal_lm(model).config.vocab_size)
        logits[-1] = torch.nan
        return logits

    monkeypatch.setattr("medlit.model.decoding.likelihood.head_logits", overflowing)
    with pytest.raises(UserError, match=r"numbers overflow for note 2; set it to 'float32' and trainer"):
        decoder(mode)(asked)


@pytest.mark.parametrize("mode", ["constrained", "likelihood"])
def test_modes_that_need_labels_are_refused_without_any(decoder: Make, mode: str) -> None:
    with pytest.raises(UserError, match=f"model.decoding.mode: '{mode}' needs the list of labels"):
        decoder(mode, LabelSet(()))


@pytest.mark.parametrize("mode", MODES)
def test_label_log_likelihoods_are_those_of_a_forward_per_token(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str], mode: str
) -> None:
    found = decoder(mode)(ask(prompt, texts))
    wanted = [[sum(one) for one in one_by_one(model, prompt, text, LABELS)] for text in texts]
    torch.testing.assert_close(found.label_nats, torch.tensor(wanted), atol=1e-3, rtol=1e-4)


# --- likelihood -------------------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_a_forward_per_label(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str]
) -> None:
    found = decoder("likelihood")(ask(prompt, texts))
    assert found.log_likelihoods is not None
    assert found.probabilities is not None
    tokens = [one_by_one(model, prompt, text, LABELS) for text in texts]
    wanted = torch.tensor([[sum(one) for one in row] for row in tokens])
    torch.testing.assert_close(found.log_likelihoods, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.probabilities, wanted.softmax(dim=1), atol=1e-4, rtol=0)
    assert found.label_ids.tolist() == wanted.argmax(dim=1).tolist()
    assert found.texts == [LABELS.names[i] for i in found.label_ids]


# --- constrained ------------------------------------------------------------------------------------------------------


def test_constrained_takes_the_most_likely_allowed_token(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str]
) -> None:
    found = decoder("constrained")(ask(prompt, texts))
    assert found.probabilities is not None
    answers = [prompt.response(name) for name in LABELS]
    for row, text in enumerate(texts):
        asked, said = prompt.prompt(text).input_ids, []
        shares = [1.0] * len(answers)
        while said not in answers:
            scores = next_scores(model, asked + said)
            allowed = sorted({answer[len(said)] for answer in answers if answer[: len(said)] == said})
            said.append(max(allowed, key=lambda token: float(scores[token])))
        for label, answer in enumerate(answers):
            for i, token in enumerate(answer):
                scores = next_scores(model, asked + answer[:i]).exp()
                allowed = sorted({other[i] for other in answers if len(other) > i and other[:i] == answer[:i]})
                shares[label] *= float(scores[token] / scores[allowed].sum())
        assert answers[found.label_ids[row]] == said
        assert found.probabilities[row].tolist() == pytest.approx(shares, abs=1e-4)
        assert sum(shares) == pytest.approx(1)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_sampling_model_is_greedy_all_the_same(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(prompt, texts)
    greedy = decoder("generate")(asked).texts
    config = causal_lm(model).generation_config
    for name, value in {"do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.9}.items():
        monkeypatch.setattr(config, name, value)
    assert decoder("generate")(asked).texts == greedy


def test_generation_takes_the_most_likely_next_token(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str]
) -> None:
    found = decoder("generate")(ask(prompt, texts[:3]))
    for text, answer in zip(texts, found.texts, strict=False):
        ids = prompt.prompt(text).input_ids
        new = []
        for _ in range(12):
            new.append(int(next_scores(model, ids + new).argmax()))
        assert answer == prompt.tokenizer.decode(new, skip_special_tokens=True)


def test_generation_is_that_of_transformers(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str]
) -> None:
    asked = ask(prompt, texts)
    with torch.no_grad():
        out = model.generate(
            input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=12, do_sample=False
        )
    wanted = prompt.tokenizer.batch_decode(out[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
    assert decoder("generate")(asked).texts == wanted


def test_scoring_labels_ahead_changes_no_answer(model: nn.Module, prompt: AlpacaPrompt, texts: list[str]) -> None:
    """The draft holds the answers' own beginnings, so that some rows follow it far and others leave it at once."""
    asked = ask(prompt, texts)
    tokenizer = prompt.tokenizer

    def answer(*drafts: list[int]) -> list[str]:
        scorer = LabelScorer(model, TokenTrie.of(drafts))
        return Generate(model, tokenizer, LABELS, 12, scorer, stop_early=False)(asked).texts

    alone = answer()
    begun = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in alone]
    drafts = [row[: 2 * i + 1] for i, row in enumerate(begun[:6])]
    assert answer(*drafts) == alone


def test_generation_stops_at_every_eos(
    decoder: Make, model: nn.Module, prompt: AlpacaPrompt, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever token the model happens to give as its third is made an EOS, for two notes at once."""
    tokenizer = prompt.tokenizer
    asked = ask(prompt, texts)
    with torch.no_grad():
        out = model.generate(
            input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=12, do_sample=False
        )
    free = out[:, asked.input_ids.shape[1] :].tolist()
    ends = [free[0][2], free[1][2]]
    assert ends[0] != ends[1]
    monkeypatch.setattr(causal_lm(model).generation_config, "eos_token_id", ends)
    first_end = [next((i for i, t in enumerate(row) if t in [*ends, tokenizer.eos_token_id]), 12) for row in free]
    wanted = [tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(free, first_end, strict=True)]
    assert decoder("generate")(asked).texts == wanted
    assert first_end[0] <= 2
    assert first_end[1] <= 2


# --- reading an answer ------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A body that is a function."""

    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, **given: Any) -> Any:  # noqa: ANN401
        return self.read(**given)


class Script(nn.Module):
    """A model that gives scripted answers, whatever it reads.

    Args:
        answers: token ids of each row's answer.
        tokenizer: of its vocabulary.
        ends: EOS ids of its generation config.
    """

    base_model_prefix = "model"
    forward = LlamaForCausalLM.forward

    def __init__(self, answers: list[list[int]], tokenizer: Tokens, ends: int | list[int] | None) -> None:
        super().__init__()
        self.answers = [[*answer, *[tokenizer.pad_token_id] * 99] for answer in answers]
        self.pad_id = tokenizer.pad_token_id
        self.config = LlamaConfig(num_hidden_layers=1)
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.lm_head = nn.Linear(len(tokenizer), len(tokenizer), bias=False)
        self.lm_head.weight.data = 30 * torch.eye(len(tokenizer))
        self.model = Body(self.read)
        self.passes = 0

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def read(self, input_ids: Tensor, use_cache: bool, **given: Any) -> Any:  # noqa: ANN401
        """Hidden states that say the next token; the cache holds each row's place and its prompt's length."""
        self.passes += 1
        if "past_key_values" in given:
            (keys, values), *_ = given["past_key_values"]
            said = given["position_ids"] + 1 - values[:, 0, :1, 0]
        else:
            lengths = (input_ids != self.pad_id).sum(dim=1)
            keys = torch.arange(len(input_ids))[:, None, None, None].expand(-1, 1, input_ids.shape[1], 1).float()
            values = lengths[:, None, None, None].expand_as(keys).float()
            said = torch.zeros_like(input_ids)
        more = [
            torch.cat([part, part[:, :, :1].expand(-1, -1, input_ids.shape[1], -1)], dim=2) for part in (keys, values)
        ]
        cache = (tuple(more),) if "past_key_values" in given else ((keys, values),)
        rows = keys[:, 0, 0, 0].long().tolist()
        tokens = [[self.answers[row][int(i)] for i in at] for row, at in zip(rows, said, strict=True)]
        hidden = nn.functional.one_hot(torch.tensor(tokens), self.lm_head.in_features).float()
        return Output((hidden,), cache)


class Output(tuple):
    """As transformers gives it: a tuple with names."""

    past_key_values: Any

    def __new__(cls, parts: tuple[Tensor, ...], cache: Any) -> Output:  # noqa: ANN401
        out = super().__new__(cls, parts)
        out.past_key_values = cache
        return out


def scripted(tokenizer: Tokens, answers: list[str], ends: int | list[int] | None = None) -> Script:
    return Script([tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers], tokenizer, ends)


def read(tokenizer: Tokens, answers: list[str], ends: int | list[int] | None = None, **given: Any) -> Answers:  # noqa: ANN401
    prompt = AlpacaPrompt(tokenizer, max_length=512)
    model = scripted(tokenizer, answers, ends)
    return make_decoder(Decoding(**given), model, prompt, LABELS)(ask(prompt, ["A note."] * len(answers)))


def test_the_first_line_counts_if_it_is_on_the_list(tokenizer: Tokens) -> None:
    answers = {
        f"{BRAIN}</s>": LABELS.index(BRAIN),
        f"  {BONE.upper()}</s>": LABELS.index(BONE),
        f"{BONE}\n\n### Instruction:\n{BRAIN}</s>": LABELS.index(BONE),
        f"{BONE} or {BRAIN}</s>": LABELS.invalid,
        f"The answer is {BONE}</s>": LABELS.invalid,
        "</s>": LABELS.invalid,
        BRAIN: LABELS.index(BRAIN),
    }
    found = read(tokenizer, list(answers), stop_early=False)
    assert found.label_ids.tolist() == list(answers.values())
    assert found.label_ids.dtype == torch.int64
    assert found.texts == [text.removesuffix("</s>") for text in answers]
    assert (found.probabilities, found.log_likelihoods) == (None, None)


def test_text_after_any_eos_is_ignored(tokenizer: Tokens) -> None:
    other = tokenizer(":", add_special_tokens=False)["input_ids"]
    found = read(tokenizer, [f"{BRAIN}</s> and more", f"{BRAIN}: and more"], other)
    assert found.texts == [BRAIN, BRAIN]


def test_an_answer_ends_where_its_label_is_settled(tokenizer: Tokens) -> None:
    """Its text is kept as far as it came, and costs no pass once the labels were read ahead."""
    answers = ["The specialty is Neurology", f"{BRAIN}\nand more", f"{BRAIN} and more", f"{BONE}</s>"]
    found = read(tokenizer, answers)
    whole = read(tokenizer, answers, stop_early=False)
    assert found.label_ids.tolist() == whole.label_ids.tolist()
    assert all(theirs.startswith(ours) for ours, theirs in zip(found.texts, whole.texts, strict=True))
    assert "specialty" not in found.texts[0]
    assert found.texts[1].strip() == BRAIN
    assert found.texts[2].startswith(f"{BRAIN} ")
    assert "more" not in "".join(found.texts)


def test_answers_on_the_list_take_two_passes(prompt: AlpacaPrompt) -> None:
    answers = [f"{name}</s>" for name in LABELS]
    model = scripted(prompt.tokenizer, answers)
    make_decoder(Decoding(), model, prompt, LABELS)(ask(prompt, ["A note."] * len(answers)))
    assert model.passes == 2


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_no_answer_is_longer_than_max_new_tokens(tokenizer: Tokens, tokens: int) -> None:
    answers = ["and" * 9, f"{BRAIN} {BONE}"]
    found = read(tokenizer, answers, max_new_tokens=tokens, stop_early=False)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in answers]
    assert found.texts == [tokenizer.decode(ids) for ids in wanted]


def test_a_label_that_is_cut_off_is_named_once(
    prompt: AlpacaPrompt, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.model.decoding.WARNED", set())
    tokens = {name: len(prompt.response(name)) - 1 for name in LABELS}
    longest = max(tokens, key=lambda name: (tokens[name], name))
    model = scripted(prompt.tokenizer, ["a"])
    for most in (tokens[longest], tokens[longest] - 1, tokens[longest] - 1):
        make_decoder(Decoding(max_new_tokens=most), model, prompt, LABELS)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"max_new_tokens: {most} cuts the label {longest!r}, which has {most + 1} tokens" in line


ODD = st.sampled_from(
    ["-", " - ", "/", " /", "\n", "\r", " ", "  ", "\t", "\x1c", "\u2028", "\xa0", "é", "É", "Σ", "ς", "ß", "İ"]
)
WORDS = st.sampled_from(["neuro", "NEURO", "logy", "Logy", "ent", "Ent", "e", "", "surgery", "ΟΔΟΣ", "οδός", "a", "A"])
SPELLED = st.lists(ODD | WORDS, max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(SPELLED, min_size=1, max_size=4), names=st.lists(SPELLED, min_size=2, max_size=5))
def test_stopping_early_never_changes_a_label(answers: list[str], names: list[str]) -> None:
    tokenizer = byte_tokenizer()
    try:
        labels = LabelSet.from_names(names)
    except UserError:
        return
    prompt = AlpacaPrompt(tokenizer, max_length=512, max_response_tokens=80)
    asked = ask(prompt, ["A note."] * (len(answers) + len(names)))
    model = scripted(tokenizer, [f"{text}<|im_end|>" for text in [*answers, *names]])
    short, whole = (
        make_decoder(Decoding(max_new_tokens=80, stop_early=early), model, prompt, labels)(asked)
        for early in (True, False)
    )
    assert short.label_ids.tolist() == whole.label_ids.tolist()
    assert whole.label_ids.tolist() == [labels.parse(text) for text in [*answers, *names]]


@pytest.mark.parametrize(("configured", "ends"), [(None, [2]), (7, [2, 7]), ([7, 2, 9], [2, 7, 9])])
def test_every_eos_is_known(tokenizer: Tokens, configured: int | list[int] | None, ends: list[int]) -> None:
    assert tokenizer.eos_token_id == 2
    assert eos_ids(scripted(tokenizer, ["a"], configured), tokenizer) == ends


def test_generation_stops_at_the_end_of_a_chat_s_turn() -> None:
    """Phi-3's tokenizer names another EOS than the one that its template ends a turn with."""
    tokenizer = tokenizer_of(FAMILIES["Phi-3"])
    prompt = ChatPrompt(tokenizer, max_length=512)
    model = scripted(tokenizer, [f"{BONE}<|end|> and more"])
    decoder = make_decoder(Decoding(max_new_tokens=40, stop_early=False), model, prompt, LABELS)
    assert decoder(ask(prompt, ["A note."])).texts == [BONE]


def test_generation_stops_where_the_model_has_no_more_positions() -> None:
    tokenizer, positions = byte_tokenizer(), 400
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=positions)).eval()
    prompt = AlpacaPrompt(tokenizer, "Name the specialty.", positions, max_response_tokens=40)
    decoder = make_decoder(Decoding(max_new_tokens=80, stop_early=False), model, prompt, LABELS)
    asked = ask(prompt, ["The heart races. " * positions])
    assert asked.input_ids.shape[1] == positions - 40
    assert len(decoder(asked).texts) == 1
