"""Which layers stay in host memory, and how the estimate and the choice of recomputed layers follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_shapes import LLAMA_8B
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from medlit.errors import UserError
from medlit.model.fit_memory import FitMemory, Offload, fit_memory, plan_offload
from medlit.model.loading import load_model
from medlit.model.memory import GIB, SLACK, Footprint, Recomputation, skeleton, weight_bytes
from medlit.model.settings import LanguageModel, Lora
from medlit.tools.doctor.dry_run import host_memory

GPU, CPU, HALF = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def set_budget(monkeypatch: pytest.MonkeyPatch, gib: float) -> int:
    budget = int(SLACK * gib * GIB)
    monkeypatch.setattr("medlit.model.fit_memory.budget_on", lambda device, limit: budget)
    return budget


def plan(shape: dict[str, int], settings: LanguageModel, device: torch.device = GPU) -> Offload:
    return plan_offload(skeleton(LlamaConfig(**shape)), settings, Lora(), device, HALF)


@pytest.mark.parametrize(
    ("shape", "tokens", "budget", "layers", "host"),
    # Counted by Unsloth's block swap on an H200 with torch 2.11.0+cu130 and unsloth 2026.10.9.
    [(LLAMA_8B, 4096, 6, 26, 2.64), (LLAMA_70B, 4096, 24, 62, 24.71)],
    ids=["8B", "70B"],
)
def test_auto_offloads_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, int], tokens: int, budget: float, layers: int, host: float
) -> None:
    set_budget(monkeypatch, budget)
    offload = plan(shape, LanguageModel(batch_tokens=tokens))
    assert offload.layers == layers
    assert offload.host / GIB == pytest.approx(host, rel=0.005)


def test_auto_offloads_nothing_that_fits_and_one_layer_less_than_all_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gib in (80, 12, 8, 7, 6, 5, 1):
        budget = set_budget(monkeypatch, gib)
        settings = LanguageModel(batch_tokens=2048)
        offload = plan(LLAMA_8B, settings)
        needed = fit_memory(LlamaConfig(**LLAMA_8B), settings, Lora(), 2048, 0, GPU, HALF)
        assert needed.offload == offload
        assert needed.total <= budget or offload.layers == 31
        found.append(offload.layers)
    assert found[:3] == [0, 0, 0]
    assert found == sorted(found)
    assert found[-1] == 31


def test_the_setting_names_the_layers_and_only_a_gpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budget(monkeypatch, 1)
    assert plan(LLAMA_8B, LanguageModel(offload="none")) == Offload()
    assert plan(LLAMA_8B, LanguageModel(gradient_checkpointing="none")) == Offload()
    assert plan(LLAMA_8B, LanguageModel(offload=8), CPU) == Offload()
    for lora in (Lora(dora=True), Lora(loftq=True), Lora(bias="all")):
        model = skeleton(LlamaConfig(**LLAMA_8B))
        assert plan_offload(model, LanguageModel(offload=8), lora, GPU, HALF) == Offload(), "these need the weights"
    eight, two, all_but_one = (plan(LLAMA_8B, LanguageModel(offload=count)) for count in (8, 2, 99))
    assert (eight.layers, two.layers, all_but_one.layers) == (8, 2, 31)
    assert two.freed == 0, "the GPU keeps room for three layers"
    assert eight.freed / 5 == eight.host / 8
    whole = weight_bytes(skeleton(LlamaConfig(**LLAMA_8B)), in_4bit=True, itemsize=2)
    assert all_but_one.host < whole


def test_an_offloaded_layer_is_recomputed() -> None:
    with pytest.raises(UserError, match=r"offload: not with gradient_checkpointing 'none'; set one to 'auto'"):
        LanguageModel(offload=2, gradient_checkpointing="none")


@given(
    tokens=st.integers(1, 20_000),
    budget=st.integers(0, 10**10),
    offloaded=st.sets(st.integers(0, 11), min_size=1, max_size=11),
)
def test_layers_in_host_memory_are_never_kept(tokens: int, budget: int, offloaded: set[int]) -> None:
    footprint = Footprint(layers=12, fixed=10**9, kept=100_000, entry=8_192, work=114_688)
    layers = [nn.Module() for _ in range(12)]
    recomputation = Recomputation(layers, footprint, budget, offloaded=offloaded)
    keeping = recomputation.prepare(tokens)
    kept = {place for place, layer in enumerate(layers) if not layer.gradient_checkpointing}
    assert len(kept) == keeping
    assert not kept & offloaded
    if keeping:  # beside the layer at work
        assert footprint.peak(tokens, keeping + 1) <= budget
    elif len(offloaded) < 11:
        assert footprint.peak(tokens, 2) > budget


def test_too_little_host_memory_is_refused_before_weights_are_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.model.loading.plan_offload", lambda *_: Offload(3, 2**45, 0, processes=2))
    with pytest.raises(UserError, match=r"offload: 3 decoder layers take 32,768\.0 GiB of host memory in each of 2"):
        load_model(LanguageModel(str(llama)), Lora(), CPU)
    needed = FitMemory(1, 1, 1, 1, layers=4, layers_kept=1, offload=Offload(3, 2**45))
    row = host_memory(needed)
    assert row.status == "fail"
    assert row.found.startswith("3 of 4 layers, 32768.0 of ")
