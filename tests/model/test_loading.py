"""Loading through Unsloth, for real, with a two-layer Llama on the CPU: which weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tokenizers import byte_tokenizer
from fakes import randomise_adapter
from tiny_families import right_padded, tiny_model
from transformers import AutoConfig, MptConfig, RwkvConfig, RwkvForCausalLM

from medlit.errors import UserError
from medlit.model.language_model import inference_mode, loss_sum, train_mode
from medlit.model.loading import load_model
from medlit.model.settings import LanguageModel, Lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(llama: Path) -> LanguageModel:
    return LanguageModel(str(llama), max_length=256, gradient_checkpointing="unsloth")


def test_a_missing_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.language_model\.base_model: owner/no-such-model is neither"):
        load_model(LanguageModel("owner/no-such-model"), Lora(), CPU)
    bare = shutil.copytree(llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.language_model\.base_model"):
        load_model(LanguageModel(str(bare)), Lora(), CPU)


@pytest.mark.parametrize(("family", "untried"), [("granite", False), ("opt", True)])
def test_an_untried_family_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, untried: bool
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    load_model(LanguageModel(str(tmp_path), max_length=64), None, torch.device("cpu"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "are untried" in line]
    assert len(lines) == untried
    assert all(line.startswith("medlit: ") and f"the family '{family}'" in line for line in lines)


def test_weights_of_another_shape_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2048}))
    with pytest.raises(UserError, match=r"lacks weights of its own architecture, or has them in another shape"):
        load_model(LanguageModel(str(folder), load_in_4bit=False), Lora(), CPU)


LONGER = {  # positions of notes that are longer than the model was trained for
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 100},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 100},
}


@pytest.mark.parametrize(
    ("family", "rope_type", "most"),
    [
        ("gpt2", "", 256),
        ("mpt", "", 100),
        ("falcon_mamba", "", None),
        ("llama", "default", None),
        ("llama", "yarn", None),
        ("llama", "dynamic", 256),
        ("phi3", "longrope", 100),
        ("gemma3_text", "longrope", 100),
    ],
)
def test_longer_notes_than_a_model_has_positions_for_are_refused(
    tmp_path: Path, family: str, rope_type: str, most: int | None
) -> None:
    """Beyond it a lookup fails in the middle of a fit, or a long note changes the others of its batch."""
    config = MptConfig(max_seq_len=100, n_layers=1) if family == "mpt" else tiny_model(family).config
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": 1.0} | LONGER.get(rope_type, {})
    if family == "gemma3_text":
        config.rope_parameters = {kind: rope for kind in ("full_attention", "sliding_attention")}  # type: ignore[union-attr]
    elif rope_type:
        config.rope_parameters = rope  # type: ignore[union-attr]
    if family == "phi3":  # which has it here too
        config.original_max_position_embeddings = 100  # type: ignore[union-attr]
    config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    longest = (most or 4096) + 1
    with pytest.raises(UserError) as refused:  # before the weights, which are not there, are read
        load_model(LanguageModel(str(tmp_path), max_length=longest, load_in_4bit=False), None, CPU)
    sentence = f"model.language_model.max_length: {tmp_path} takes at most {most} tokens"
    assert (sentence in str(refused.value)) == (most is not None)
    with pytest.raises(UserError, match="base_model"):
        load_model(LanguageModel(str(tmp_path), max_length=longest - 1, load_in_4bit=False), None, CPU)


def test_exactly_the_named_repository_is_loaded(settings: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default Unsloth replaces many names by another repository, without the revision."""
    from unsloth import FastLanguageModel

    asked: dict[str, object] = {}
    stock = FastLanguageModel.from_pretrained

    def from_pretrained(name: str, **arguments: object) -> object:
        asked.update(arguments, name=name)
        return stock(name, **arguments)

    monkeypatch.setattr(FastLanguageModel, "from_pretrained", staticmethod(from_pretrained))
    load_model(replace(settings, revision="v1.0"), None, CPU)
    assert (asked["name"], asked["revision"]) == (settings.base_model, "v1.0")
    assert asked["use_exact_model_name"] is True


def test_weights_stored_in_4_bits_are_not_loaded_as_16(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    (folder / "model.safetensors").unlink()  # refused before the weights are read
    with pytest.raises(UserError, match=r"model\.language_model\.load_in_fp8: .*llama is quantised; set it to false"):
        load_model(LanguageModel(str(folder), load_in_4bit=False, load_in_fp8=True), Lora(), CPU)
    with pytest.raises(UserError, match=r"model\.language_model\.load_in_4bit: .*llama is stored in 4-bit"):
        load_model(LanguageModel(str(folder), load_in_4bit=False), Lora(), CPU)
    monkeypatch.setattr("unsloth_zoo.cpu.loader.cpu_bnb_4bit_supported", lambda: False)
    with pytest.raises(UserError, match=r"model\.language_model\.load_in_4bit: .* did not load in 4-bit"):
        load_model(LanguageModel(str(llama)), Lora(), CPU)


def test_settings_that_need_a_gpu_are_refused_on_a_cpu(settings: LanguageModel) -> None:
    half = LanguageModel(settings.base_model, dtype="float16")
    with pytest.raises(UserError, match=r"model\.language_model\.dtype: float16 does not train on a CPU"):
        load_model(half, Lora(), CPU)


def test_rwkv_computes_the_same_in_training_and_evaluation(llama: Path, tmp_path: Path) -> None:
    """Transformers divides the weights of its deep layers in evaluation, but not what an adapter adds to them."""
    config = RwkvConfig(
        vocab_size=AutoConfig.from_pretrained(llama).vocab_size, hidden_size=64, num_hidden_layers=8, rescale_every=2
    )
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    language_model = LanguageModel(str(tmp_path), max_length=64, load_in_4bit=False)
    model = load_model(language_model, Lora(), CPU)
    randomise_adapter(model)
    batch, losses = right_padded([list(range(30, 60))], [11, 12, 2]), []
    for mode in (lambda: train_mode(model, language_model), lambda: inference_mode(model)):
        mode()
        with torch.no_grad():
            losses.append(float(loss_sum(model, batch)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_settings_of_lora_reach_the_adapter(settings: LanguageModel) -> None:
    """`seed` aside, which PEFT's configuration does not keep."""
    values = {"r": 8, "alpha": 32, "dropout": 0.25, "bias": "lora_only", "rslora": True}
    lora = Lora(**values, target_modules=["down_proj", "q_proj"], seed=1)  # type: ignore[arg-type]
    config: Any = load_model(settings, lora, CPU).peft_config["default"]  # type: ignore[index]
    found = (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.use_rslora)
    assert found == tuple(values.values())
    assert set(config.target_modules) == {"down_proj", "q_proj"}


def test_the_seed_reaches_the_initialisation(settings: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth import FastLanguageModel

    given: dict[str, object] = {}

    def get_peft_model(model: object, **arguments: object) -> object:
        given.update(arguments)
        return model

    monkeypatch.setattr(FastLanguageModel, "get_peft_model", staticmethod(get_peft_model))
    load_model(settings, Lora(seed=5), CPU)
    assert given["random_state"] == 5
