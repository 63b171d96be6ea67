"""An adapter folder is PEFT's, is loaded as it was saved, and fits its base model or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import randomise_adapter, write_llama
from torch import Tensor, nn

from medlit.base_model import load_tokenizer
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder, load_adapter, save_adapter
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata
from medlit.model.families import causal_lm
from medlit.model.language_model import inference_mode, trainable_names
from medlit.model.loading import load_model
from medlit.model.settings import LanguageModel, Lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(llama: Path) -> LanguageModel:
    return LanguageModel(str(llama), max_length=256)


@pytest.fixture(scope="module")
def model(settings: LanguageModel) -> nn.Module:
    """The tiny model with an adapter that changes something."""
    model = load_model(settings, Lora(), CPU)
    randomise_adapter(model)
    return model


def save(model: nn.Module, folder: Path, llama: Path, revision: str | None = None) -> AdapterMetadata:
    metadata = AdapterMetadata.of(LanguageModel("owner/name", revision), Lora(), LabelSet.from_names(["a", "b"]))
    folder.mkdir(exist_ok=True)
    save_adapter(model, load_tokenizer(str(llama)), metadata, folder)  # type: ignore[arg-type]
    return metadata


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return causal_lm(model)(input_ids=torch.arange(3, 250).view(1, -1)).logits


def test_peft_alone_loads_the_adapter_to_the_same_logits(
    model: nn.Module, settings: LanguageModel, llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    metadata = save(model, tmp_path, llama, "v1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    names = {file.name for file in tmp_path.iterdir() if "token" not in file.name}
    assert names == {"adapter_config.json", "adapter_model.safetensors", METADATA_FILE}
    assert AdapterMetadata.read(tmp_path / METADATA_FILE) == metadata
    read = PeftModel.from_pretrained(load_model(settings, None, CPU), tmp_path)
    inference_mode(model)
    assert torch.allclose(logits(model), logits(read), atol=1e-6)
    assert model.peft_config["default"].base_model_name_or_path == settings.base_model, "as it was"


def test_an_adapter_that_was_saved_is_the_same_when_loaded(
    model: nn.Module, settings: LanguageModel, llama: Path, tmp_path: Path
) -> None:
    save(model, tmp_path, llama)
    fresh = load_model(settings, Lora(seed=9), CPU)
    load_adapter(fresh, tmp_path)
    for name in trainable_names(model):
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize(
    "lora", [Lora(r=8), Lora(target_modules=["q_proj"]), Lora(target_modules=["o_proj", "q_proj"])]
)
def test_an_adapter_of_another_shape_is_refused(
    model: nn.Module, settings: LanguageModel, llama: Path, tmp_path: Path, lora: Lora
) -> None:
    save(load_model(settings, lora, CPU), tmp_path, llama)
    with pytest.raises(UserError, match=r"model\.adapter: .*fit"):
        load_adapter(model, tmp_path)


def test_an_adapter_of_a_wider_model_is_refused(model: nn.Module, llama: Path, tmp_path: Path) -> None:
    wide = LanguageModel(str(write_llama(tmp_path / "wide", hidden=128)), max_length=256)
    save(load_model(wide, Lora(), CPU), tmp_path / "adapter", llama)
    with pytest.raises(UserError, match=r"model\.adapter: the weights in .* do not fit"):
        load_adapter(model, tmp_path / "adapter")


def test_a_broken_or_missing_adapter_is_refused(model: nn.Module, llama: Path, tmp_path: Path) -> None:
    save(model, tmp_path / "whole", llama)
    short = shutil.copytree(tmp_path / "whole", tmp_path / "short") / "adapter_model.safetensors"
    short.write_bytes(short.read_bytes()[:1000])
    for folder in (short.parent, tmp_path / "none"):
        with pytest.raises(UserError, match=r"model\.adapter: .* is missing or broken"):
            load_adapter(model, folder)


def test_an_adapter_is_looked_for_in_a_folder_and_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.adapter: .* holds no adapter_config\.json"):
        adapter_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.adapter: \./nowhere holds no adapter_config\.json"):
        adapter_folder("./nowhere")
    with pytest.raises(UserError, match="owner/no-such-adapter is neither a folder nor available from the Hub"):
        adapter_folder("owner/no-such-adapter")
    (tmp_path / "adapter_config.json").touch()
    assert adapter_folder(str(tmp_path)) == tmp_path
