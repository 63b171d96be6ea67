"""An adapter folder is PEFT's, is loaded as it was saved, and fits its base model or is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tokenizers import byte_tokenizer
from fakes import randomise_adapter, write_llama
from tiny_families import tiny_gemma3
from torch import Tensor, nn

from medlit.base_model import BUILTIN, load_tokenizer
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder, adapter_settings, load_adapter, read_metadata, save_adapter
from medlit.model.adapter_metadata import METADATA_FILE, PEFT_FILE, AdapterMetadata, read_peft_config
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


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A whole Gemma 3, of which medlit loads and adapts the text part."""
    tiny_gemma3().save_pretrained(folder := tmp_path_factory.mktemp("gemma"))  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return LanguageModel(str(folder), max_length=64, load_in_4bit=False)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4),
        Lora(r=4, dora=True, bias="all", layers_to_transform=[1, 3], target_modules=["q_proj", "up_proj"]),
        Lora(r=4, rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"q_proj": 3}, target_modules=r".*\.[13]\..*proj"),
        Lora(r=4, target_modules=["model.layers.1.mlp.up_proj"]),
    ],
    ids=lambda lora: lora.target_modules if len(lora.target_modules) < 7 else "default",
)
def test_peft_alone_finds_the_layers_of_a_text_part_in_the_whole_model(
    gemma: LanguageModel, tmp_path: Path, lora: Lora
) -> None:
    from peft import AutoPeftModelForCausalLM

    ours: Any = load_model(gemma, lora, CPU)
    randomise_adapter(ours)
    before = dict(vars(ours.peft_config["default"]))
    save_adapter(ours, byte_tokenizer(), AdapterMetadata.of(gemma, lora, LabelSet.from_names(["a", "b"])), tmp_path)
    assert vars(ours.peft_config["default"]) == before
    inference_mode(ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter")  # keys that are missing
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(causal_lm(theirs)).__name__ == "Gemma3ForConditionalGeneration"
    assert not any("vision" in name for name in trained(theirs))
    assert len(trained(theirs)) == len(trained(ours))
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)
    with theirs.disable_adapter():
        assert not torch.allclose(logits(theirs), logits(ours), atol=1e-2)
    # Also without medlit's file, as an adapter that PEFT wrote for the whole model.
    for settings in (
        Lora(**AdapterMetadata.read(tmp_path / METADATA_FILE).lora),
        read_peft_config(tmp_path / PEFT_FILE)[1],
    ):
        again: Any = load_model(gemma, settings, CPU)
        load_adapter(again, tmp_path)
        inference_mode(again)
        assert torch.allclose(logits(again), logits(ours), atol=1e-6)


def trained(model: Any) -> list[str]:  # noqa: ANN401 - PEFT's own
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"model\.language_model", "model.decoder"),
        (r"(language_model.*0\.mlp.*)", r"vision_tower.\1"),
        (r"(q_proj.*)", r"\1.more"),
        (r"^base_model\.model\.", ""),
    ],
)
def test_names_that_the_model_does_not_have_are_refused(
    gemma: LanguageModel, tmp_path: Path, before: str, after: str
) -> None:
    from safetensors.torch import load_file, save_file

    ours: Any = load_model(gemma, Lora(), CPU)
    save_adapter(ours, byte_tokenizer(), AdapterMetadata.of(gemma, Lora(), LabelSet.from_names(["a", "b"])), tmp_path)
    weights = load_file(file := tmp_path / "adapter_model.safetensors")
    load_adapter(ours, tmp_path)
    save_file({re.sub(before, after, name): value for name, value in weights.items()}, file)
    with pytest.raises(UserError, match=r"^model\.adapter: .*fit.*\.$"):
        load_adapter(ours, tmp_path)
    more = {"base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight": torch.zeros(4, 4)}
    for changed, numbers in ((weights | more, "0 .* and 1 have"), (dict(list(weights.items())[1:]), "1 .* and 0 have")):
        save_file(changed, file)
        with pytest.raises(
            UserError, match=rf"^model\.adapter: .* does not fit: {numbers} no place in this base model\.$"
        ):
            load_adapter(ours, tmp_path)


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


# --- an adapter that PEFT alone wrote ---------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The tiny model with biases that are not zero."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(llama, tmp_path_factory.mktemp("biased"), dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(llama, attention_bias=True, dtype=torch.float32).save_pretrained(folder)
    return folder


def write_peft(base: Path, folder: Path, **settings: object) -> nn.Module:
    """Write an adapter that changes something with PEFT; give PEFT's own model, as PEFT loads it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def load() -> Any:  # noqa: ANN401 - transformers' own class
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    made: Any = get_peft_model(load(), LoraConfig(**PLAIN | settings))
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and name.endswith("bias")):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data *= 1.5
    made.save_pretrained(folder)
    return PeftModel.from_pretrained(load(), folder).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8}},
        {"alpha_pattern": {"down_proj": 32, r"layers\.1\..*q_proj": 2}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"target_modules": ["o_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.layers\.0\..*(q|up)_proj"},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [1]},
        {"fan_in_fan_out": True, "init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_it_is_run_as_peft_runs_it(llama: Path, biased: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = biased if "bias" in settings else llama
    theirs = write_peft(base, tmp_path / "theirs", **settings)
    ours = LanguageModel(str(base), max_length=256, load_in_4bit=False)
    assert read_metadata(tmp_path / "theirs", ours.base_model) is None
    _, lora = read_peft_config(tmp_path / "theirs" / PEFT_FILE)
    loaded: Any = load_model(ours, lora, CPU)
    load_adapter(loaded, tmp_path / "theirs")
    trained = trainable_names(loaded)
    assert any(name.endswith("bias") for name in trained) == ("bias" in settings)
    inference_mode(loaded)
    assert torch.allclose(logits(loaded), logits(theirs), atol=1e-4)
    # And what medlit writes of it is read as the same, by medlit and by PEFT.
    (tmp_path / "ours").mkdir()
    metadata = AdapterMetadata.of(ours, lora, LabelSet.from_names(["a", "b"]))
    save_adapter(loaded, load_tokenizer(str(base)), metadata, tmp_path / "ours")
    assert adapter_settings(tmp_path / "ours") == (ours.base_model, None, lora.structure())
    assert read_metadata(tmp_path / "ours", ours.base_model) == metadata
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(logits(PeftModel.from_pretrained(again, tmp_path / "ours").eval()), logits(theirs), atol=1e-4)


def test_weights_in_another_format_and_order(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_peft(llama, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name].half() for name in reversed(weights)}, file)
    loaded: Any = load_model(LanguageModel(str(llama), max_length=256), read_peft_config(tmp_path / PEFT_FILE)[1], CPU)
    load_adapter(loaded, tmp_path)
    for name, value in weights.items():
        found = loaded.get_parameter(name.replace(".weight", ".default.weight"))
        assert found.dtype == torch.float32
        assert torch.equal(found, value.half().float())
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin may hold code"):
        adapter_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("lora_alpha", 64), ("use_rslora", True), ("alpha_pattern", {"q_proj": 2})]
)
def test_a_scale_that_the_model_does_not_have_is_refused(
    model: nn.Module, llama: Path, tmp_path: Path, name: str, value: object
) -> None:
    """The weights are the same, so nothing else shows the difference; medlit's file gives way to PEFT's."""
    metadata = save(model, tmp_path, llama)
    edit(tmp_path, **{name: value})
    with pytest.raises(UserError, match=r"model\.lora\..*: model\.adapter: .* does not fit"):
        load_adapter(model, tmp_path)  # type: ignore[arg-type]
    read = AdapterMetadata.read(tmp_path / METADATA_FILE)
    assert value in read.lora.values()
    assert {**read.lora, **metadata.lora} == metadata.lora


def edit(folder: Path, **values: object) -> None:
    file = folder / PEFT_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_temperature_and_thresholds_of_another_scale_are_forgotten(
    model: nn.Module, llama: Path, tmp_path: Path
) -> None:
    save(model, tmp_path, llama)
    file = tmp_path / METADATA_FILE
    fitted = {"temperatures": {"mode=generate": 2.0}, "thresholds": {"mode=generate": {"0.9": 0.5}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | fitted))
    read = AdapterMetadata.read(file)
    assert {"temperatures": read.temperatures, "thresholds": read.thresholds} == fitted
    edit(tmp_path, lora_alpha=64)
    read = AdapterMetadata.read(file)
    assert (read.temperatures, read.thresholds) == ({}, {})


def test_the_layers_of_a_family_of_other_names_are_read_from_peft_s_file(
    model: nn.Module, llama: Path, tmp_path: Path
) -> None:
    metadata = save(model, tmp_path, llama)
    file = tmp_path / METADATA_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperatures": {"mode=generate": 2.0}}))
    for names in (["c_attn", "c_fc"], r"model\.layers\.(0|1)\.q_proj"):
        edit(tmp_path, target_modules=names)
        read = AdapterMetadata.read(file)
        assert read.lora == metadata.lora | {"target_modules": names}
        assert read.temperatures == {"mode=generate": 2.0}
    edit(tmp_path, target_modules=[*Lora().target_modules, "qkv_proj"])  # as Unsloth adds a fused layer
    assert AdapterMetadata.read(file).lora == metadata.lora


def test_peft_finds_the_base_model_under_the_name_that_is_written(
    model: nn.Module, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(llama))
    monkeypatch.chdir(llama.parent)
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for named, written in ((BUILTIN, hub), (llama.name, str(llama)), ("owner/name", "owner/name")):
        metadata = AdapterMetadata.of(LanguageModel(named), Lora(), LabelSet.from_names(["a", "b"]))
        save_adapter(model, tokenizer, metadata, tmp_path)  # type: ignore[arg-type]
        assert json.loads((tmp_path / PEFT_FILE).read_text())["base_model_name_or_path"] == written
        assert adapter_settings(tmp_path)[0] == named, "medlit's own file keeps the user's name"
    (tmp_path / METADATA_FILE).unlink()
    edit(tmp_path, base_model_name_or_path=hub)
    assert read_metadata(tmp_path, BUILTIN) is None, "and the Hub's name is the bundled model's too"
