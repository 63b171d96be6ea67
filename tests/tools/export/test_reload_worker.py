"""A fresh process scores labels as the whole sequences would be scored, with the model's own head."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_tokenizers import byte_tokenizer
from fakes import randomise_adapter
from tiny_families import FAMILIES, tiny_gemma3, tiny_model, tiny_multimodal

from medlit.data.labels import LabelSet
from medlit.model.adapter import save_adapter
from medlit.model.adapter_metadata import AdapterMetadata
from medlit.model.loading import load_model
from medlit.model.settings import LanguageModel, Lora
from medlit.tools.export import reload_worker

PROMPTS = [[1, *range(20, 45)], [1, 5, 6]]
ANSWERS = [[7, 8, 2], [9, 2]]


def scores(folder: Path, dtype: str) -> np.ndarray:
    """What the worker answers for the prompts, (N, K)."""
    request = {"loader": "transformers", "path": str(folder), "device": "cpu", "dtype": dtype}
    request |= {"prompts": PROMPTS, "answers": ANSWERS, "texts": []}
    return np.array(reload_worker.answer(request)["log_likelihood"])


def whole_sequence(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of an answer, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.float().log_softmax(-1)[torch.arange(len(answer)), answer].sum())


@pytest.fixture
def gemma(llama: Path, tmp_path: Path) -> Path:
    """A tiny Gemma 2, whose logits are soft-capped, with the tiny model's tokenizer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=768,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        final_logit_softcapping=5.0,
        sliding_window=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_scores_are_those_of_whole_sequences_soft_cap_included(gemma: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    expected = [[whole_sequence(model, prompt, answer) for answer in ANSWERS] for prompt in PROMPTS]
    np.testing.assert_allclose(scores(gemma, "float32"), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_whatever_its_cache_keeps(family: str) -> None:
    model = tiny_model(family)
    expected = [[whole_sequence(model, prompt, answer) for answer in ANSWERS] for prompt in PROMPTS]
    np.testing.assert_allclose(reload_worker.score(model, PROMPTS, ANSWERS), expected, atol=1e-4)


def test_a_model_that_has_no_class_for_text_alone_is_scored_whole(llama: Path, tmp_path: Path) -> None:
    (model := tiny_multimodal()).save_pretrained(tmp_path)  # type: ignore[operator]
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    expected = [[whole_sequence(model, prompt, answer) for answer in ANSWERS] for prompt in PROMPTS]
    np.testing.assert_allclose(scores(tmp_path, "float32"), expected, atol=1e-4)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_an_adapter_of_a_text_part_is_scored_on_the_whole_model(
    tmp_path: Path, in_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That kernel of newer CPUs rounds to bfloat16, and refuses widths that are no multiple of 64.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    tiny_gemma3().save_pretrained(tmp_path)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(tmp_path)
    base = LanguageModel(str(tmp_path), max_length=64, load_in_4bit=in_4bit, dtype="float32")
    model = load_model(base, Lora(r=4), torch.device("cpu"))
    randomise_adapter(model)
    (tmp_path / "adapter").mkdir()
    metadata = AdapterMetadata.of(base, Lora(r=4), LabelSet.from_names(["a", "b"]))
    save_adapter(model, byte_tokenizer(), metadata, tmp_path / "adapter")  # type: ignore[arg-type]
    request = {"loader": "peft", "base": str(tmp_path), "revision": None, "load_in_4bit": in_4bit}
    request |= {"path": str(tmp_path / "adapter"), "device": "cpu"}
    request |= {"dtype": "float32", "prompts": PROMPTS, "answers": ANSWERS, "texts": []}
    expected = [[whole_sequence(model.eval(), prompt, answer) for answer in ANSWERS] for prompt in PROMPTS]
    np.testing.assert_allclose(reload_worker.answer(request)["log_likelihood"], expected, atol=1e-3)
