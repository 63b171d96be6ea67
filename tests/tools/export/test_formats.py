"""The merge is PEFT's own, GGUF files answer like the model, and what cannot be written is refused before loading."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import exit_code_of
from exports import exported, files, left, verification
from fake_tokenizers import byte_tokenizer
from fakes import randomise_adapter
from tiny_families import tiny_model
from transformers import AutoModelForCausalLM, Gemma3Config, Qwen3Config

from medlit.errors import UserError
from medlit.model.loading import load_model
from medlit.model.settings import LanguageModel, Lora
from medlit.tools.export import formats
from medlit.tools.export.formats import (
    INSTALL,
    base_weights,
    check_convertible,
    merged_weight,
    rope_factors,
    write_merged,
)

ROOT = Path(__file__).parents[3]
FAILING_LLAMA_CPP = ROOT / "tests" / "failing_llama_cpp"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODEL = {"README.md", "config.json", "generation_config.json", "medlit.json", "model.safetensors", "tokenizer.json"}

# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_a_merged_model_answers_like_the_measured_one(run: Path) -> None:
    folder = exported(run, "merged")
    assert files(folder) == MODEL | {"confusion.png", "tokenizer_config.json", "verification.json"}
    (row,) = verification(folder)["exports"]
    assert row["against_medlit"]["changed"] == 0
    assert 0 < row["against_medlit"]["drift_max"] < 0.2
    assert verification(folder)["notes"]["ids"][0] == "test-00"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.usefixtures("in_process")
def test_an_adapter_is_merged_into_weights_rounded_to_fp8(run: Path) -> None:
    fp8 = ("--model.language_model.load_in_4bit", "false", "--model.language_model.load_in_fp8", "true")
    folder = exported(run, "merged", *fp8)
    (row,) = verification(folder)["exports"]
    assert row["against_medlit"]["changed"] == 0
    assert 0 < row["against_medlit"]["drift_max"] < 0.2
    assert verification(folder)["added_to"] == "the weights that it was trained on (16-bit, rounded to FP8)"
    assert "| base weights | 16-bit, rounded to FP8 |" in (folder / "README.md").read_text()


def test_a_merge_expands_fp8_weights_one_at_a_time(llama: Path) -> None:
    settings = LanguageModel(str(llama), max_length=64, load_in_4bit=False, load_in_fp8=True)
    model = load_model(settings, Lora(), torch.device("cpu")).eval()
    held = {parameter.data_ptr() for parameter in model.parameters()}
    weights = base_weights(model)
    assert all(weight.data_ptr() in held for weight in weights.values())
    assert {merged_weight(model, name, weight).dtype for name, weight in weights.items()} == {torch.bfloat16}


@pytest.mark.usefixtures("in_process")
def test_an_adapter_trained_on_fp8_weights_is_compared_on_16_bits(run: Path) -> None:
    """As PEFT alone loads it."""
    fp8 = ("--model.language_model.load_in_4bit", "false", "--model.language_model.load_in_fp8", "true")
    folder = exported(run, "adapter", *fp8)
    (row,) = verification(folder)["exports"]
    assert row["against_medlit"]["changed"] <= 1
    assert 0 < row["against_medlit"]["drift_max"] < 0.5
    assert (
        "it was trained on these rounded to FP8, so that a few answers can differ" in (folder / "README.md").read_text()
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize(
    "more", [{}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.+down_proj": 3}, "layers_to_transform": [1]}]
)
def test_the_sum_is_pefts_own(
    llama: Path, tmp_path: Path, rslora: bool, bias: str, dora: bool, more: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attention_bias=bias != "none")
    targets = ["q_proj", "o_proj", "down_proj"]
    settings = LoraConfig(
        r=4, lora_alpha=24, target_modules=targets, use_rslora=rslora, use_dora=dora, bias=bias, **more
    )
    model = get_peft_model(base, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    base.config.save_pretrained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    write_merged(model, str(tmp_path / "base"), None, tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    theirs = model.merge_and_unload().to(torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dora", [False, True])
def test_the_sum_is_pefts_own_where_weights_are_stored_inputs_by_outputs(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=dora)
    model = get_peft_model(tiny_model("gpt2"), settings)  # type: ignore[arg-type]
    randomise_adapter(model)
    ours = {name: merged_weight(model, name, weight) for name, weight in base_weights(model).items()}
    theirs = model.merge_and_unload().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_several_shards_are_one_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, size in (("one", 10**9), ("several", 50_000)):
        monkeypatch.setattr(formats, "SHARD_BYTES", size)
        (tmp_path / name).mkdir()
        write_merged(whole, str(llama), None, tmp_path / name)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_gpt_2_in_4_bits_is_merged_the_way_round_that_it_is_stored(tmp_path: Path) -> None:
    (model := tiny_model("gpt2")).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(
        LanguageModel(str(tmp_path), max_length=64), Lora(target_modules=["c_attn"]), torch.device("cpu")
    )
    merged = {name: merged_weight(loaded, name, weight) for name, weight in base_weights(loaded).items()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(merged[name].float(), weight.data, atol=0.2, rtol=0.05)


def test_the_text_part_of_a_multimodal_model_is_merged_alone(tmp_path: Path) -> None:
    model: Any = tiny_model("gemma3_text")
    Gemma3Config(text_config=model.config.to_dict()).save_pretrained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    write_merged(model, str(tmp_path / "base"), None, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.architectures == [type(model).__name__] == [type(merged).__name__]
    theirs = model.bfloat16().state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in merged.state_dict().items())


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_gguf_files_read_by_transformers_answer_alike(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "has_llama_cpp", lambda: False)
    folder = exported(run, "gguf", "--max_drift", "2", "--max_changed", "0.2")
    others = {"Modelfile", "README.md", "confusion.png", "medlit.json", "verification.json"}
    assert files(folder) == others | {"model-f16.gguf", "model-q8_0.gguf"}
    full, eight = verification(folder)["exports"]
    assert full["against_medlit"]["changed"] == 0
    assert full["against_medlit"]["all_median"] < eight["against_medlit"]["all_median"]
    assert "dequantised" in full["reader"]


def test_llama_3s_rotary_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = rope_factors(config)
    assert factors is not None
    np.testing.assert_allclose(plain / factors, theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "gemma2"}, "this is 'gemma2'"),
        ("config.json", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "'linear'"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
        ("config.json", {"hidden_act": "gelu"}, "'gelu'"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, "this one has another tokenizer"),
        # Phi-4's, whose words are merged where Llama 3's are taken whole.
        ("tokenizer.json", {"pre_tokenizer": {"pattern": {"Regex": LLAMA_3}}}, "this one has another tokenizer"),
    ],
)
def test_an_unsupported_model_is_refused(llama: Path, tmp_path: Path, file: str, change: Any, message: str) -> None:  # noqa: ANN401
    folder = shutil.copytree(llama, tmp_path / "llama")
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"proven for Llama 3 and SmolLM .*{message}.* convert_hf_to_gguf.py on that"):
        check_convertible(str(folder), None, ["f16"])


def test_llama_3s_tokenizer_is_supported(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    values = json.loads((folder / "tokenizer.json").read_text()) | {"pre_tokenizer": {"pattern": {"Regex": LLAMA_3}}}
    values["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    check_convertible(str(folder), None, ["f16"])


def test_a_refused_gguf_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "read_config", lambda *_: Qwen3Config())
    with pytest.raises(UserError, match=r"^to: .*this is 'qwen3'"):
        exported(run, "gguf")
    assert left(run) == set()


def test_a_missing_quantiser_is_reported(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    for absent in ("llama_cpp", "diskcache"):  # the second is the first one's only requirement that medlit lacks
        monkeypatch.setattr(
            formats.importlib.util,
            "find_spec",
            lambda name, absent=absent: None if name == absent else find_spec("json" if name == "llama_cpp" else name),
        )
        with pytest.raises(UserError, match=r"llama\.cpp, which is not installed; run 'pip install --no-deps "):
            check_convertible(str(llama), None, ["q4_k_m"])
        check_convertible(str(llama), None, ["f16", "q8_0"])


def test_the_install_command_names_the_extras_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = " ".join(f'"{one}"' for one in project["project"]["optional-dependencies"]["gguf"])
    assert f"'pip install --no-deps {requirements}'" in INSTALL


@pytest.fixture
def quantiser(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a llama.cpp that ends in the middle of a file, where other processes find it too."""

    def install(ends: str) -> None:
        monkeypatch.setenv("PYTHONPATH", str(FAILING_LLAMA_CPP))
        monkeypatch.setenv("LLAMA_CPP", ends)
        monkeypatch.setattr(formats, "has_llama_cpp", lambda: True)

    return install


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("assertion", r"\(GGML_ASSERT\(n == 256\) failed\)"),
        ("error", r"\(data is corrupted\)"),
        ("silence", r"\(exit code -6\)"),
    ],
)
def test_a_failing_quantiser_is_reported_and_leaves_nothing(
    run: Path, quantiser: Callable[[str], None], ends: str, message: str
) -> None:
    quantiser(ends)
    with pytest.raises(UserError, match=f"gguf_types: llama.cpp could not quantise this model to q4_k_m {message}"):
        exported(run, "gguf", "--gguf_types", "q4_k_m")
    assert left(run) == set()


def test_a_quantiser_ends_with_its_export(
    run: Path, quantiser: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("quantiser")
    process, unfinished = folder / "process", folder / "unfinished"
    quantiser(f"hangs:{process}")

    def end() -> None:
        while not process.is_file() or not process.read_text():
            time.sleep(0.05)
        unfinished.write_text(" ".join(left(run)))
        os.kill(os.getpid(), signal.SIGTERM)

    def export() -> None:
        threading.Thread(target=end, daemon=True).start()
        exported(run, "gguf", "--gguf_types", "q4_k_m")

    begun = time.monotonic()
    assert exit_code_of(export) == 143
    assert time.monotonic() - begun < 50, "it did not wait for llama.cpp"
    assert unfinished.read_text()
    assert left(run) == set()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process.read_text()), 0)
