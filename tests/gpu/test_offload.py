"""Layers in host memory: the numbers of a model that is on the GPU as a whole, in less of its memory.

LLAMA_TOKENIZER=folder pytest -m gpu -s tests/gpu/test_offload.py
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GIB = 2**30
LABELS = [[128, 130, 128009], [128, 131, 132, 128009], [140, 128009]]
LENGTHS = [600, 300, 512, 47]
LAYERS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of an 8B Llama."""
    from shapes import family_config, write_model

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    return write_model(tmp_path_factory.mktemp("llama"), family_config("llama31_8b", num_hidden_layers=LAYERS))


def measure(base: Path, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Load, then take a loss, its gradient and log-likelihoods of labels, twice."""
    import torch
    from lightning.fabric.utilities import move_data_to_device
    from tiny_families import left_padded

    from medlit.data.collate import Collator, unnamed_rows
    from medlit.data.prompt import Prompt
    from medlit.model.decoding.kv_cache import read_prompts
    from medlit.model.decoding.likelihood import LabelScorer
    from medlit.model.decoding.trie import TokenTrie
    from medlit.model.families import block_swap
    from medlit.model.language_model import (
        at_default_precision,
        inference_mode,
        loss_sum,
        make_recomputation,
        train_mode,
    )
    from medlit.model.loading import load_model
    from medlit.model.settings import LanguageModel, Lora

    device = torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()
    language_model = LanguageModel(str(base), max_length=2048, batch_tokens=2048, **settings)
    with device:  # as under Lightning
        model = load_model(language_model, Lora(), device)
    loaded = torch.cuda.memory_allocated()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1100, 100_000, (length,), generator=draw).tolist() for length in LENGTHS]
    batch = Collator(lambda _: LABELS[0], pad_id=0).packed(unnamed_rows([Prompt(each, 0) for each in prompts]), 1)
    recomputation = make_recomputation(model, language_model, Lora())
    losses, gradients = [], []
    for _ in range(2):  # training again after an evaluation
        train_mode(model, language_model)
        torch.cuda.reset_peak_memory_stats()
        with at_default_precision(model):
            loss = loss_sum(model, move_data_to_device(batch, device), recomputation)
        loss.backward()
        peak = torch.cuda.max_memory_allocated()
        kept = sum(not layer.gradient_checkpointing for layer in recomputation.layers) if recomputation else None
        losses.append(float(loss))
        gradients.append(torch.cat([p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
        with torch.no_grad(), at_default_precision(model):
            inference_mode(model)
            scorer = LabelScorer(model, TokenTrie.of(LABELS))
            nats = scorer.paths(scorer.edges(read_prompts(model, left_padded(prompts).on(device)))).float().cpu()
    found = {"loaded": loaded, "peak": peak, "nats": nats, "losses": losses, "gradients": gradients, "kept": kept}
    swap = block_swap(model)
    found["offloaded"] = [] if swap is None else swap.indices
    print(
        f"\n{settings}: {len(found['offloaded'])} in host memory, {kept} kept, loaded {loaded / GIB:.2f} GiB,", end=" "
    )
    print(f"peak {peak / GIB:.2f}, losses {losses}")
    if recomputation is not None and settings:
        estimate = recomputation.footprint.peak(batch.input_ids.numel(), kept + recomputation.at_work) / GIB
        print(f"estimated {estimate:.2f} GiB")
    return found


@pytest.fixture(scope="module")
def whole(base: Path) -> dict[str, Any]:
    return measure(base, offload="none")


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": 1},
        {"offload": 9},
        {"offload": 9, "gradient_checkpointing": "unsloth"},
        {"offload": "auto", "memory_budget_gib": 4.3},
    ],
    ids=str,
)
def test_layers_in_host_memory_change_no_number(base: Path, whole: dict[str, Any], settings: dict[str, Any]) -> None:
    found = measure(base, **settings)
    assert 0 < len(found["offloaded"]) < LAYERS
    if settings["offload"] != "auto":
        assert len(found["offloaded"]) == settings["offload"]
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    for ours, theirs in zip(found["gradients"], whole["gradients"], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    assert float((found["nats"] - whole["nats"]).abs().max()) < 0.1
    if len(found["offloaded"]) > 3:
        assert found["loaded"] < whole["loaded"]
    if "memory_budget_gib" in settings:
        assert found["peak"] < settings["memory_budget_gib"] * GIB
