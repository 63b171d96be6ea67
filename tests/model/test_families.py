"""What differs between families: numbers beside plain transformers in float32, and attention over packed notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, WINDOW, left_padded, right_padded, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from medlit.model.decoding.kv_cache import Replay, read_prompts
from medlit.model.decoding.likelihood import LabelScorer
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import REPLAY, causal_lm, has_dropout, head_logits, load_options, route
from medlit.model.language_model import loss_sum

# One token, around the window, and beyond it; the labels' tokens cross it where the prompt stays inside.
LENGTHS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)
LABELS = [[11, 12, 13, 2], [11, 14, 2], [20, 2], [11, 12, 15, 16, 17, 18, 19, 21, 2]]
RUNNING_STATE = ("qwen3_next", "lfm2", "falcon_mamba")


def made_prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(30, VOCABULARY - 10, (length,), generator=draw).tolist() for length in LENGTHS]


def plain(model: nn.Module, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token after each one by the model's own forward, (T, V)."""
    return causal_lm(model)(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def label_nats(model: nn.Module, prompt: list[int], label: list[int]) -> Tensor:
    rows = plain(model, prompt + label)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(label)[:, None]).sum()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = tiny_model(request.param)
    if request.param == "bloom":  # the self-check finds this out
        vars(model)[REPLAY] = True
    return model


def test_labels_are_as_likely_as_in_plain_forwards(model: nn.Module) -> None:
    prompts = made_prompts()
    scorer = LabelScorer(model, TokenTrie.of(LABELS))
    ours = scorer.paths(scorer.edges(read_prompts(model, left_padded(prompts))))
    with torch.no_grad():
        theirs = torch.stack([torch.stack([label_nats(model, p, label) for label in LABELS]) for p in prompts])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_loss_and_its_gradient_are_those_of_plain_forwards(model: nn.Module) -> None:
    prompts, label = made_prompts(), LABELS[0]
    batch = right_padded(prompts, label)
    weight = next(p for p in model.parameters() if p.dim() == 1)
    theirs = -torch.stack([label_nats(model, prompt, label) for prompt in prompts]).sum()
    ours = loss_sum(model, batch)
    tokens = len(label) * len(prompts)
    torch.testing.assert_close(ours / tokens, theirs / tokens, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss / tokens, weight)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_plain_forwards(model: nn.Module) -> None:
    prompts = made_prompts()
    prefix, answers = read_prompts(model, left_padded(prompts)), [[*prompt] for prompt in prompts]
    for _ in range(WINDOW):
        with torch.no_grad():
            chosen = head_logits(model, prefix.last).argmax(dim=1)
            for answer, token in zip(answers, chosen.tolist(), strict=True):
                scores = plain(model, answer)[-1]
                assert scores.max() - scores[token] < 1e-4
                answer.append(token)
        prefix = prefix.extend(chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool))


@pytest.mark.parametrize("family", RUNNING_STATE)
def test_a_running_state_is_never_shared(family: str) -> None:
    model = tiny_model(family)
    assert isinstance(read_prompts(model, left_padded(made_prompts())), Replay)


def test_dropout_of_the_base_model_is_seen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    assert not has_dropout(tiny_model("llama"))
    assert has_dropout(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)))


def test_a_capped_attention_is_not_left_to_sdpa_on_a_cpu() -> None:
    config = tiny_model("gemma2").config
    assert load_options(config, on_gpu=False) == {"attn_implementation": "eager"}
    assert load_options(config, on_gpu=True) == {}


def by_note(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """What the varlen kernel computes, note by note: (T, heads, D)."""
    out = []
    for start, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def stock(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
    """Unsloth's call for a batch of one length: (B, heads, T, D) to (B, T, heads, D)."""
    return functional.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True).transpose(1, 2)


def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    attend = route(stock, by_note)
    return attend(config=None, context=SimpleNamespace(causal_mask=mask), Q=query, K=key, V=value)


def test_a_packed_note_attends_as_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 21, 8, generator=draw) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 6, 15, 21, 21], dtype=torch.int32)
    together = call(query, key, value, starts)
    assert together.shape == (1, 21, 4, 8)
    for start, end in ((0, 5), (5, 6), (6, 15), (15, 21)):
        alone = call(*(x[:, :, start:end] for x in (query, key, value)), None)
        assert torch.allclose(together[:, start:end], alone, atol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6)])
def test_unpacked_batches_use_the_stock_attention(mask: Tensor | None) -> None:
    query, key, value = (torch.randn(3, heads, 6, 8) for heads in (4, 2, 2))
    ours = call(query, key, value, mask)
    assert torch.equal(ours, stock(config=None, context=None, Q=query, K=key, V=value))
