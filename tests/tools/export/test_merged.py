"""The merge is PEFT's own, in shards that transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import exported, files, verification

from medlit.tools.export import merged
from medlit.tools.export.merged import merged_weights, write_merged

MODEL = {"README.md", "config.json", "generation_config.json", "medlit.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.usefixtures("in_process")
def test_a_merged_model_answers_like_the_measured_one(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = exported(run, "merged")
    assert files(folder) == MODEL | {"confusion.png", "tokenizer_config.json", "verification.json"}
    (row,) = verification(folder)["exports"]
    assert row["against_medlit"]["changed"] == 0
    assert 0 < row["against_medlit"]["drift_max"] < 0.2
    assert verification(folder)["notes"]["ids"][0] == "test-00"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_the_sum_is_pefts_own(llama: Path, tmp_path: Path, rslora: bool, bias: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attention_bias=bias != "none")
    targets = ["q_proj", "o_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=24, target_modules=targets, use_rslora=rslora, bias=bias)
    model = get_peft_model(base, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    base.config.save_pretrained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    write_merged(merged_weights(model), tmp_path / "base", tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    theirs = model.merge_and_unload().to(torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_several_shards_are_one_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, size in (("one", 10**9), ("several", 50_000)):
        monkeypatch.setattr(merged, "_SHARD_BYTES", size)
        (tmp_path / name).mkdir()
        write_merged(merged_weights(whole), llama, tmp_path / name)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)
