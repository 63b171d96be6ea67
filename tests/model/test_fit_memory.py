"""Which layers stay in host memory, and how the estimate and the choice of recomputed layers follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from base_shapes import LLAMA_8B
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from medlit.errors import UserError
from medlit.model.fit_memory import FitMemory, Offload, fit_memory, peak_of_loading, plan_offload
from medlit.model.loading import load_model
from medlit.model.memory import GIB, SLACK, Footprint, Recomputation, free_on, skeleton, weight_bytes
from medlit.model.settings import LanguageModel, Lora
from medlit.tools.doctor.dry_run import host_memory

GPU, CPU, HALF = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405B = LLAMA_8B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
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
    [
        (LLAMA_8B, 4096, 6, 26, 2.64),
        (LLAMA_8B, 4096, 8, 7, 0.71),
        (LLAMA_70B, 4096, 24, 62, 24.71),
        (LLAMA_70B | {"num_hidden_layers": 40}, 4096, 20, 22, 8.77),
        (LLAMA_405B | {"num_hidden_layers": 40}, 4096, 40, 32, 47.5),
    ],
    ids=["8B in 6", "8B in 8", "70B in 24", "half a 70B in 20", "a third of a 405B in 40"],
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
        assert offload.layers or offload == plan(LLAMA_8B, replace(settings, offload="none"))
        found.append(offload.layers)
    assert found[:3] == [0, 0, 0]
    assert found == sorted(found)
    assert found[-1] == 31


def test_the_setting_names_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budget(monkeypatch, 1)
    whole = weight_bytes(skeleton(LlamaConfig(**LLAMA_8B)), LanguageModel(), itemsize=2)
    for settings in (LanguageModel(offload="none"), LanguageModel(gradient_checkpointing="none")):
        assert plan(LLAMA_8B, settings)[:3] == (0, 0, whole)
    eight, two, all_but_one = (plan(LLAMA_8B, LanguageModel(offload=count)) for count in (8, 2, 99))
    assert (eight.layers, two.layers, all_but_one.layers) == (8, 2, 31)
    assert two.weights == whole, "the GPU keeps room for three layers"
    assert (whole - eight.weights) / 5 == eight.host / 8
    assert all_but_one.host < whole


@pytest.mark.parametrize(
    ("device", "settings", "lora", "why"),
    [
        (CPU, {}, Lora(), "without a GPU"),
        (GPU, {"gradient_checkpointing": "none"}, Lora(), "with gradient_checkpointing 'none'"),
        (GPU, {"load_in_4bit": False, "load_in_fp8": True}, Lora(), "with load_in_fp8"),
        *((GPU, {}, lora, "with DoRA or") for lora in (Lora(dora=True), Lora(bias="all"))),
    ],
    ids=str,
)
def test_layers_that_must_stay_on_the_gpu_are_refused_if_named(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, settings: dict[str, Any], lora: Lora, why: str
) -> None:
    set_budget(monkeypatch, 1)
    model = skeleton(LlamaConfig(**LLAMA_8B))
    with pytest.raises(UserError, match=rf"^model\.language_model\.offload: not {why}.*; set it to 'auto'\.$"):
        plan_offload(model, LanguageModel(offload=2, **settings), lora, device, HALF)
    for offload in ("auto", "none", 0):
        assert not plan_offload(model, LanguageModel(offload=offload, **settings), lora, device, HALF).layers


def test_processes_agree_on_the_layers_and_count_those_of_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everywhere: list[object], mine: tuple[int, str]) -> None:
        everywhere[:] = [mine, (mine[0] + 5, mine[1]), (mine[0] - 1, "another host's kernel")]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    offload = plan(LLAMA_8B, LanguageModel(offload=8, batch_tokens=1))
    assert (offload.layers, offload.processes) == (13, 2)
    assert plan(LLAMA_8B, LanguageModel(offload=8)).processes == 1, "a predictor"


def test_fp8_weights_need_room_to_be_made_from_16_bits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of embedding and head no other form is made; of the rest one matrix at a time, from two copies in float32."""
    settings, model = LanguageModel(str(llama), load_in_4bit=False, load_in_fp8=True), skeleton(LlamaConfig(**LLAMA_8B))
    offload = plan_offload(model, settings, Lora(), GPU, HALF)
    needed = peak_of_loading(model, settings, offload.weights, HALF)
    assert needed == 2 * model.num_parameters() + 8 * 4096 * 14336
    assert needed < 2 * offload.weights, "all of them twice"
    monkeypatch.setattr("medlit.model.loading.peak_of_loading", lambda *_: 2**50)
    with pytest.raises(UserError, match=r"base_model: the weights of .* take about 1,048,576 GiB, and this machine"):
        load_model(settings, Lora(), CPU)


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
    monkeypatch.setattr("medlit.model.loading.plan_offload", lambda *_: Offload(3, 2**45, processes=2))
    with pytest.raises(UserError, match=r"offload: 3 decoder layers take 32,768\.0 GiB of host memory in each of 2"):
        load_model(LanguageModel(str(llama)), Lora(), CPU)
    needed = FitMemory(1, 1, 1, 1, layers=4, layers_kept=1, offload=Offload(3, 2**45))
    row = host_memory(needed, 2)
    assert row.status == "fail"
    assert row.found.startswith("3 of 4 layers in 2 processes, 65536.0 of ")


def test_every_process_of_a_host_takes_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=30 * GIB))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=100 * GIB))
    needed = FitMemory(1, 1, 1, 1, layers=80, layers_kept=1, offload=Offload(62, 25 * GIB))
    rows = [host_memory(needed, count) for count in (1, 2)]
    assert [(row.status, row.found) for row in rows] == [
        ("ok", "62 of 80 layers in 1 process, 25.0 of 30.0 GiB that are free"),
        ("fail", "62 of 80 layers in 2 processes, 50.0 of 30.0 GiB that are free"),
    ]
    assert free_on(CPU) == 30 * GIB, "pages of swap are no memory"
