"""The model's settings: each one of the adapter reaches PEFT."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from peft import LoraConfig

from medlit.model.settings import Lora

# Field -> its argument of PEFT's LoraConfig and a value; a field that is missing here fails a test.
IN_PEFT: dict[str, tuple[str, Any]] = {
    "r": ("r", 7),
    "alpha": ("lora_alpha", 9),
    "dropout": ("lora_dropout", 0.25),
    "bias": ("bias", "lora_only"),
    "target_modules": ("target_modules", ["q_proj", "down_proj"]),
    "rslora": ("use_rslora", True),
    "dora": ("use_dora", True),
    "rank_pattern": ("rank_pattern", {"q_proj": 4}),
    "alpha_pattern": ("alpha_pattern", {"q_proj": 4}),
    "layers_to_transform": ("layers_to_transform", [1]),
}
# Arguments of `FastLanguageModel.get_peft_model` (see test_loading.py).
AT_LOAD = {"seed"}


def test_every_field_of_lora_is_sent_to_peft() -> None:
    assert IN_PEFT.keys() | AT_LOAD == {field.name for field in fields(Lora)}


@pytest.mark.parametrize("name", IN_PEFT)
def test_a_field_of_lora_is_peft_s_argument(name: str) -> None:
    argument, value = IN_PEFT[name]
    config = LoraConfig(**Lora(**{name: value}).as_peft())
    found = getattr(config, argument)
    assert (sorted(found) if isinstance(found, set) else found) == (sorted(value) if isinstance(value, list) else value)


def test_nothing_else_is_set_in_peft() -> None:
    assert Lora().as_peft().keys() == {argument for argument, _ in IN_PEFT.values()}


def test_the_order_of_targets_is_no_structure() -> None:
    targets = Lora().target_modules
    assert Lora(target_modules=targets[::-1]).structure() == Lora().structure()


@pytest.mark.parametrize("name", IN_PEFT)
def test_a_setting_is_read_back_from_peft(name: str) -> None:
    lora = Lora(**{name: IN_PEFT[name][1]})
    assert Lora.from_peft(LoraConfig(**lora.as_peft()).to_dict()).structure() == lora.structure()


def test_what_a_file_of_peft_lacks_has_peft_s_default() -> None:
    assert Lora.from_peft({"target_modules": "q_proj"}) == Lora(r=8, alpha=8, target_modules="q_proj")
    lora = Lora.from_peft({"target_modules": ["q_proj"], "layers_to_transform": 0, "lora_alpha": 32.0})
    assert (lora.layers_to_transform, lora.alpha) == ([0], 32)


@pytest.mark.parametrize("seen", [["b", "a"], ["a", "b"]])
def test_patterns_have_the_order_in_which_peft_saves_them(seen: list[str]) -> None:
    assert list(Lora(rank_pattern=dict.fromkeys(seen, 2)).as_peft()["rank_pattern"]) == ["a", "b"]
