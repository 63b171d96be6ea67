"""Trained weights go into the model that they were trained in, or into none."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from medlit.data.labels import LabelSet
from medlit.data.splits import DataFingerprint
from medlit.errors import UserError
from medlit.model.adapter_metadata import (
    AdapterMetadata,
    check_metadata,
    metadata_of_weights,
    read_fitted,
    write_fitted,
)
from medlit.model.settings import Decoding, LanguageModel, Lora

LABELS = LabelSet.from_names(["Neurology", "Radiology", "Orthopedic"])
TRAINED = AdapterMetadata.of(LanguageModel("owner/name", "abc"), Lora(), LABELS)
# A value other than the default for every field of `Lora`; a field that is missing here fails a test.
OTHER_LORA: dict[str, Any] = {
    "r": 8,
    "alpha": 32,
    "dropout": 0.1,
    "bias": "all",
    "target_modules": ["q_proj"],
    "rslora": True,
    "dora": True,
    "seed": 1,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "layers_to_transform": [0],
}
# Do not change what trained weights mean.
TRAINING_ONLY = {"dropout", "seed"}


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
        ours(LanguageModel("owner/name", "abc", max_length=64, load_in_4bit=False, gradient_checkpointing="none")),
    ],
    ids=["equal", "no labels in the data", "fewer labels", "targets in another order", "training only", "loading only"],
)
def test_settings_that_do_not_change_the_weights_may_differ(same: AdapterMetadata) -> None:
    check_metadata(same, TRAINED, "the checkpoint")


@pytest.mark.parametrize("instruction", ["Which specialty?", None])
def test_an_instruction_that_is_not_in_the_file_is_not_compared(instruction: str | None) -> None:
    older = TRAINED.to_dict()
    del older["instruction"]
    check_metadata(replace(ours(), instruction=instruction), AdapterMetadata.from_dict(older), "the checkpoint")


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (
            ours(LanguageModel("owner/other", "abc")),
            "model.language_model.base_model: the checkpoint was trained with 'owner/name'",
        ),
        (
            ours(LanguageModel("owner/name", None)),
            "model.language_model.revision: the checkpoint .* with 'abc'",
        ),
        (ours(lora=Lora(r=8)), "model.lora.r: the checkpoint was trained with 16 and the config says 8"),
        (replace(ours(), lora={}), "model.lora: null is the bare base model and the checkpoint is an adapter"),
        (replace(ours(), instruction="Which?"), "data.instruction: the checkpoint was trained with 'Classify the"),
        (replace(ours(), prompt="alpaca-0"), "the prompt 'alpaca-1' and this medlit uses 'alpaca-0'"),
        (replace(ours(), prompt="chat-1"), "data.prompt_format: .* with 'alpaca' .* says 'chat'"),
        (replace(ours(), template="{transcription}"), "model.language_model.revision: .* another chat template"),
        (ours(labels=LabelSet.from_names(["Urology", "Neurology"])), "data.columns.label: .*'Urology'"),
    ],
)
def test_a_difference_that_matters_is_refused_by_name(other: AdapterMetadata, names: str) -> None:
    with pytest.raises(UserError, match=names):
        check_metadata(other, TRAINED, "the checkpoint")


def test_a_chat_template_is_part_of_the_metadata(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, base := tmp_path / "base")
    settings = LanguageModel(str(base), prompt_format="chat")
    with pytest.raises(UserError, match="needs a chat template"):
        ours(settings)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    chat = ours(settings)
    assert (chat.prompt, chat.prompt_format) == ("chat-1", "chat")
    assert chat.template == "{instruction}\n{transcription}</s>{specialty}</s>"
    assert AdapterMetadata.from_dict(json.loads(json.dumps(chat.to_dict()))) == chat
    assert (TRAINED.prompt_format, TRAINED.template) == ("alpaca", None)


def test_every_field_of_lora_has_another_value_here() -> None:
    defaults = Lora()
    assert OTHER_LORA.keys() == {field.name for field in fields(Lora)}
    assert all(getattr(defaults, name) != value for name, value in OTHER_LORA.items())


@pytest.mark.parametrize("name", [field.name for field in fields(Lora)])
def test_every_field_of_lora_is_compared_unless_it_is_of_training_only(name: str) -> None:
    other = ours(lora=Lora(**{name: OTHER_LORA[name]}))
    if name in TRAINING_ONLY:
        check_metadata(other, TRAINED, "the checkpoint")
    else:
        with pytest.raises(UserError, match=rf"model\.lora\.{name}: the checkpoint was trained with"):
            check_metadata(other, TRAINED, "the checkpoint")


def test_an_older_file_has_no_fp8_weights_and_another_config_may_have_them() -> None:
    older = TRAINED.to_dict()
    assert older["inference"].pop("load_in_fp8") is False
    assert AdapterMetadata.from_dict(older) == TRAINED
    fp8 = ours(LanguageModel("owner/name", "abc", load_in_4bit=False, load_in_fp8=True))
    assert fp8.to_dict()["inference"]["load_in_fp8"] is True
    assert AdapterMetadata.from_dict(json.loads(json.dumps(fp8.to_dict()))) == fp8
    check_metadata(fp8, TRAINED, "the checkpoint")


def test_a_setting_of_lora_that_an_older_file_lacks_had_its_default() -> None:
    older = TRAINED.to_dict()
    del older["lora"]["dora"]
    theirs = AdapterMetadata.from_dict(older)
    check_metadata(ours(), theirs, "the checkpoint")
    with pytest.raises(UserError, match=r"model\.lora\.dora: the checkpoint was trained with False"):
        check_metadata(ours(lora=Lora(dora=True)), theirs, "the checkpoint")


def test_the_loftq_of_release_0_2_matters_where_it_was_on() -> None:
    off, on = (
        AdapterMetadata.from_dict(TRAINED.to_dict() | {"lora": TRAINED.lora | {"loftq": x}}) for x in (False, True)
    )
    check_metadata(ours(), off, "the checkpoint")
    with pytest.raises(UserError, match=r"model\.lora\.loftq: the checkpoint was trained with True"):
        check_metadata(ours(), on, "the checkpoint")


def test_a_setting_of_lora_that_only_a_newer_file_knows_is_compared() -> None:
    newer = AdapterMetadata.from_dict(TRAINED.to_dict() | {"lora": TRAINED.lora | {"vera": True}})
    with pytest.raises(UserError, match=r"model\.lora\.vera: the checkpoint was trained with True"):
        check_metadata(ours(), newer, "the checkpoint")


INFERENCE = TRAINED.to_dict()["inference"]


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
                {"template": 3},
                {"inference": 3},
                {"inference": {"max_length": 2048}},
                {"inference": INFERENCE | {"max_length": 0}},
                {"inference": INFERENCE | {"max_length": True}},
                {"inference": INFERENCE | {"max_response_tokens": "32"}},
                {"inference": INFERENCE | {"load_in_4bit": 1}},
                {"inference": INFERENCE | {"load_in_fp8": 0}},
                {"inference": INFERENCE | {"dtype": "float8"}},
                {"inference": INFERENCE | {"keep": "head"}},
                {"keep": "head", "conditions": {"max_length": 1024}},  # release 0.1
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
                {"thresholds": [0.5]},
                {"thresholds": {"generate": 0.5}},
                {"thresholds": {"generate": {"0.9": "0.5"}}},
                {"thresholds": {"generate": {"0.9": 1.5}}},
                {"thresholds": {"generate": {"0.9": math.nan}}},
            )
        ),
    ],
    ids=str,
)
def test_a_file_of_another_program_is_refused(values: Any) -> None:  # noqa: ANN401 - whatever a file may hold
    with pytest.raises(UserError, match="not written by this version of medlit"):
        AdapterMetadata.from_dict(values)


FINGERPRINT = {"source": "notes.csv", "revision": None, "hashes": {"train": "aa"}}


# --- temperatures -----------------------------------------------------------------------------------------------------


def test_a_temperature_is_added_to_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "medlit.json"
    before = replace(TRAINED, data=DataFingerprint.from_dict(FINGERPRINT), temperatures={"mode=likelihood": 1.5})
    file.write_text(json.dumps(before.to_dict()))
    file.chmod(0o644)
    write_fitted(file, Decoding(), 2.0, {})
    write_fitted(file, Decoding(max_new_tokens=9), 2.5, {"0.9": 0.25})
    after = AdapterMetadata.read(file)
    assert after == replace(
        before,
        temperatures={"mode=likelihood": 1.5, "mode=generate": 2.5},
        thresholds={"mode=generate": {"0.9": 0.25}},
    )
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("temperature", "kept"),
    [(1.5, {"0.875": 0.2}), (1.5 + 1e-6, {"0.875": 0.2}), (1.51, {})],  # 1.51: other answers to the notes
)
def test_thresholds_of_the_same_answers_are_kept_beside_those_of_a_new_validation(
    tmp_path: Path, temperature: float, kept: dict[str, float]
) -> None:
    file = tmp_path / "medlit.json"
    file.write_text(json.dumps(TRAINED.to_dict()))
    decoding = Decoding("likelihood", coverage=0.875)
    write_fitted(file, Decoding("constrained"), 1.5, {"0.625": 0.7})
    write_fitted(file, decoding, 1.5, {"0.875": 0.2, "0.9": 0.1})
    write_fitted(file, Decoding("likelihood"), temperature, {"0.9": 0.15})
    assert read_fitted(None, str(tmp_path), decoding)[:2] == (temperature, kept | {"0.9": 0.15})
    assert read_fitted(None, str(tmp_path), Decoding("constrained"))[:2] == (1.5, {"0.625": 0.7})


def test_sets_that_hold_every_label_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, decoding = tmp_path / "medlit.json", Decoding("likelihood", coverage=0.95)
    file.write_text(json.dumps(TRAINED.to_dict()))
    write_fitted(file, decoding, 1.5, {"0.9": 0.1, "0.95": 0.0})
    read_fitted(None, tmp_path, replace(decoding, coverage=0.9), complete=True)
    assert capsys.readouterr().err == ""
    read_fitted(None, tmp_path, decoding, complete=True)
    assert "too few for it, so that every set holds every label" in capsys.readouterr().err


@pytest.mark.parametrize("decoding", [Decoding("likelihood", coverage=0.9), Decoding("likelihood", answer="set")])
def test_a_threshold_is_fitted_only_where_there_are_weights(tmp_path: Path, decoding: Decoding) -> None:
    (tmp_path / "medlit.json").write_text(json.dumps(TRAINED.to_dict()))
    with pytest.raises(UserError, match=r"there are no weights to have a threshold; give ckpt_path or model\.adapter"):
        read_fitted(None, None, decoding, complete=True)
    for weights in ((None, str(tmp_path)), (tmp_path / "last.ckpt", None)):
        with pytest.raises(UserError, match=rf"the weights have no threshold for {decoding.sets} .* 'medlit validate'"):
            read_fitted(*weights, decoding, complete=True)


def test_the_weights_in_use_have_their_metadata_in_an_adapter_folder_or_nowhere(tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    assert metadata_of_weights(best, None) is None, "a run without an adapter folder"
    for folder in (run / "adapter", adapter):
        folder.mkdir(parents=True)
        (folder / "medlit.json").touch()
    assert metadata_of_weights(best, None) == run / "adapter" / "medlit.json"
    assert metadata_of_weights(last, None) is None
    assert metadata_of_weights(tmp_path / "best.ckpt", None) is None, "not in a run folder"
    assert metadata_of_weights(None, str(adapter)) == adapter / "medlit.json"
    assert metadata_of_weights(last, str(adapter)) is None, "the checkpoint's weights are used"
    assert metadata_of_weights(best, str(adapter)) == run / "adapter" / "medlit.json"
    assert metadata_of_weights(None, "owner/on-the-hub") is None
    assert metadata_of_weights(None, None) is None
