"""Trained weights go into the model that they were trained in, or into none."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.model.adapter_metadata import AdapterMetadata, check_metadata
from medlit.model.settings import LanguageModel, Lora

LABELS = LabelSet.from_names(["Neurology", "Radiology", "Orthopedic"])
TRAINED = AdapterMetadata.of(LanguageModel("owner/name", "abc"), Lora(), LABELS)


def ours(
    language_model: LanguageModel | None = None, lora: Lora | None = None, labels: LabelSet = LABELS
) -> AdapterMetadata:
    return AdapterMetadata.of(language_model or LanguageModel("owner/name", "abc"), lora or Lora(), labels)


def test_it_survives_json() -> None:
    assert AdapterMetadata.from_dict(json.loads(json.dumps(TRAINED.to_dict()))) == TRAINED


@pytest.mark.parametrize(
    "same",
    [
        ours(),
        ours(labels=LabelSet(())),
        ours(labels=LabelSet.from_names(["radiology ", "Neurology"])),
        ours(lora=Lora(target_modules=list(reversed(Lora().target_modules)))),
        ours(lora=Lora(dropout=0.1, seed=1)),
        ours(LanguageModel("owner/name", "abc", max_length=64, load_in_4bit=False, gradient_checkpointing="off")),
    ],
    ids=["equal", "no labels in the data", "fewer labels", "targets in another order", "training only", "loading only"],
)
def test_what_does_not_change_the_weights_may_differ(same: AdapterMetadata) -> None:
    check_metadata(same, TRAINED, "the checkpoint")


@pytest.mark.parametrize("instruction", ["Which specialty?", None])
def test_weights_that_do_not_say_what_they_were_told_are_not_compared(instruction: str | None) -> None:
    older = TRAINED.to_dict()
    del older["instruction"]
    check_metadata(replace(ours(), instruction=instruction), AdapterMetadata.from_dict(older), "the checkpoint")


def test_weights_of_a_time_that_knew_one_way_to_cut_were_cut_so() -> None:
    older = TRAINED.to_dict()
    del older["keep"]
    assert AdapterMetadata.from_dict(older) == TRAINED


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (
            ours(LanguageModel("owner/other", "abc")),
            "model.language_model.base_model: the checkpoint belongs to 'owner/name'",
        ),
        (ours(LanguageModel("owner/name", None)), "model.language_model.revision: the checkpoint belongs to 'abc'"),
        (ours(lora=Lora(r=8)), "model.lora.r: the checkpoint was trained with 16 and the config says 8"),
        (ours(lora=Lora(alpha=32)), "model.lora.alpha"),
        (ours(lora=Lora(bias="all")), "model.lora.bias"),
        (ours(lora=Lora(rslora=True)), "model.lora.rslora"),
        (ours(lora=Lora(loftq=True)), "model.lora.loftq"),
        (ours(lora=Lora(target_modules=["q_proj"])), "model.lora.target_modules"),
        (replace(ours(), instruction="Which?"), "data.instruction: the checkpoint was trained with 'Classify the"),
        (replace(ours(), keep="head_tail"), "data.keep: the checkpoint was trained with 'head'.*set it to 'head'"),
        (replace(ours(), prompt="alpaca-0"), "the prompt 'alpaca-1' and this medlit asks with 'alpaca-0'"),
        (ours(labels=LabelSet.from_names(["Urology", "Neurology"])), "data.columns.label: .*'Urology'"),
    ],
)
def test_what_does_is_refused_by_name(other: AdapterMetadata, names: str) -> None:
    with pytest.raises(UserError, match=names):
        check_metadata(other, TRAINED, "the checkpoint")


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        "text",
        {"base_model": "x"},
        *(
            TRAINED.to_dict() | damage
            for damage in (
                {"extra": 1},
                {"base_model": None},
                {"revision": 3},
                {"prompt": ["alpaca-1"]},
                {"instruction": 3},
                {"keep": "tail"},
                {"keep": ["head"]},
                {"lora": None},
                {"lora": [["r", 16]]},
                {"labels": 3},
                {"labels": "Neurology"},
                {"labels": [1, 2]},
                {"labels": {"Neurology": 0}},
                {"temperatures": [1.0]},
                {"temperatures": {"generate": "1"}},
                {"temperatures": {"generate": None}},
                {"temperatures": {"generate": 0.0}},
                {"temperatures": {"generate": -1.0}},
                {"temperatures": {"generate": math.nan}},
                {"temperatures": {"generate": math.inf}},
            )
        ),
    ],
    ids=str,
)
def test_a_file_of_another_program_is_refused(values: Any) -> None:  # noqa: ANN401 - whatever a file may hold
    with pytest.raises(UserError, match=re.escape("not written by medlit, or by a version unknown here")):
        AdapterMetadata.from_dict(values)
