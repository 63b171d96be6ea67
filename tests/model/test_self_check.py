"""The self-check: right families pass, a number made wrong on purpose is refused or computed another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn

from medlit.errors import UserError
from medlit.model.decoding import kv_cache, likelihood
from medlit.model.families import REPLAY, head_logits, sliding_window
from medlit.model.self_check import check_numbers
from medlit.model.settings import LanguageModel

SETTINGS = LanguageModel("tiny", max_length=64)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family: str) -> None:
    model = tiny_model(family)
    check_numbers(model, SETTINGS)
    replayed = ("bloom", "qwen3_next", "lfm2", "falcon_mamba", "llama4_text")
    assert vars(model)[REPLAY] == (family in replayed)


def test_a_wrong_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model: nn.Module, hidden: Tensor) -> Tensor:
        return 2 * head_logits(model, hidden)

    monkeypatch.setattr(likelihood, "head_logits", doubled)
    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .* differs by [\d.]+ nats; choose"):
        check_numbers(tiny_model("llama"), SETTINGS)


def test_a_wrong_scale_in_the_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.model.language_model.head_logits", lambda *given: head_logits(*given) / 2)
    with pytest.raises(UserError, match=r": a batch's loss differs by [\d.]+ nats; choose"):
        check_numbers(tiny_model("llama"), SETTINGS)


def test_a_window_or_mask_that_no_other_way_mends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.model.self_check.shares_prompts", lambda model: False)
    monkeypatch.setattr(kv_cache, "_append", lambda ids, lengths, *_: (ids, torch.ones_like(ids, dtype=torch.bool)))
    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .*; choose another base model\.$"):
        check_numbers(tiny_model("mistral"), SETTINGS)


def test_a_wrong_window_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "sliding_window", lambda model: 1 + (sliding_window(model) or 0))
    model = tiny_model("mistral")
    check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def test_a_mask_that_is_dropped_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache.KVCache, "_masks", lambda *_: None)
    model = tiny_model("llama")
    check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def test_a_slow_check_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("medlit.model.self_check.REMEMBERED", 0.0)
    check_numbers(tiny_model("bloom"), SETTINGS)
    [record] = (tmp_path / "cache" / "checked").iterdir()
    assert record.read_text().split() == ["{", '"replay":', "true", "}"]
    model = tiny_model("bloom")
    with monkeypatch.context() as patch:
        patch.setattr("medlit.model.self_check.loss_sum", lambda *_: pytest.fail("checked again"))
        check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def test_other_weights_of_the_same_shape_are_checked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("medlit.model.self_check.REMEMBERED", 0.0)
    model, folder = tiny_model("llama"), tmp_path / "base"
    model.save_pretrained(folder)  # type: ignore[operator]
    records = tmp_path / "cache" / "checked"
    for count in (1, 1, 2):
        if count == 2:
            file = folder / "model.safetensors"
            file.write_bytes(file.read_bytes() + b" ")
        check_numbers(model, LanguageModel(str(folder), max_length=64))
        assert len(list(records.iterdir())) == count
