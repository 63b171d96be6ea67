"""Stock classes of transformers, whatever was patched before."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from torch import nn

from medlit.unsloth_first import stock_class

OLMO2 = "transformers.models.olmo2.modeling_olmo2"


def test_a_patched_class_is_as_in_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module(OLMO2)
    masks: Any = importlib.import_module("transformers.masking_utils")

    def patched(*_: object) -> None:
        """Neither a forward pass nor a mask."""

    for place, name in ((module.Olmo2Model, "forward"), (masks, "create_causal_mask"), (module, "create_causal_mask")):
        monkeypatch.setattr(place, name, patched)

    class Olmo2Model(module.Olmo2PreTrainedModel):  # type: ignore[misc, name-defined]
        """Takes the place of the one in the module, as compiled classes do."""

    for patched_class in (module.Olmo2Model, Olmo2Model):
        stock: Any = stock_class(patched_class)
        assert stock.__name__ == "Olmo2Model"
        assert stock.forward is not patched
        assert sys.modules[stock.__module__].create_causal_mask is not patched  # type: ignore[attr-defined]
        assert stock_class(stock) is stock
    assert sys.modules[OLMO2] is module
    assert module.Olmo2Model.forward is patched


def test_a_class_that_transformers_does_not_have_stays() -> None:
    module: Any = importlib.import_module(OLMO2)

    class Own(module.Olmo2Model):  # type: ignore[misc, name-defined]
        """Of another name."""

    assert stock_class(Own) is Own
    assert stock_class(nn.Linear) is nn.Linear
