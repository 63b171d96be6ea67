"""The language model behind Unsloth, for real: NF4 weights, LoRA and modes on the CPU, with a two-layer Llama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import randomise_adapter
from torch import Tensor, nn

from medlit.data.collate import Batch, Collator, TokenisedNote
from medlit.model import language_model
from medlit.model.families import causal_lm
from medlit.model.language_model import loss_sum
from medlit.model.loading import load_model
from medlit.model.memory import Footprint, Recomputation
from medlit.model.settings import LanguageModel, Lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(llama: Path) -> LanguageModel:
    return LanguageModel(str(llama), max_length=256, gradient_checkpointing="unsloth")


@pytest.fixture(scope="module")
def loaded(settings: LanguageModel) -> nn.Module:
    return load_model(settings, Lora(), CPU)


@pytest.fixture
def model(loaded: nn.Module, settings: LanguageModel) -> nn.Module:
    """The tiny model, ready to train, with an adapter that changes something."""
    randomise_adapter(loaded)
    language_model.train_mode(loaded, settings)
    return loaded


def batch(mask_prompt: bool = True, *, packed: bool = False) -> Batch:
    """Four notes of unlike length with answers of unlike length."""
    draw = torch.Generator().manual_seed(0)
    answers = {name: torch.randint(3, 250, (n,), generator=draw).tolist() for name, n in (("a", 2), ("b", 7), ("c", 4))}
    rows = [
        TokenisedNote(
            row=i,
            id=str(i),
            text_hash="",
            input_ids=torch.randint(3, 250, (n,), generator=draw).tolist(),
            cut_tokens=0,
            specialty=name,
        )
        for i, (n, name) in enumerate([(30, "a"), (11, "b"), (55, "c"), (42, "a")])
    ]
    collator = Collator(answers.__getitem__, 0, mask_prompt)
    return (collator.packed if packed else collator.train)(rows, step_tokens=1)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], rel: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, theirs_of in theirs.items():
        assert (ours[name] - theirs_of).norm() <= rel * theirs_of.norm(), name


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_only_the_adapter_gets_gradient_and_it_is_float32(llama: Path, dtype: str) -> None:
    settings = LanguageModel(str(llama), max_length=256, dtype=dtype)  # type: ignore[arg-type]
    model = load_model(settings, Lora(r=4, target_modules=["q_proj", "up_proj"]), CPU)
    randomise_adapter(model)
    language_model.train_mode(model, settings)
    trained = gradients(model, loss_sum(model, batch()))
    assert trained.keys() == language_model.trainable_names(model)
    assert len(trained) == 2 * 2 * 2, "A and B of two layers' two targets"
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (name in trained)
        if name in trained:
            assert parameter.dtype == trained[name].dtype == torch.float32
            assert trained[name].abs().sum() > 0


def test_the_frozen_weights_are_four_bit_numbers(model: nn.Module) -> None:
    from bitsandbytes.nn import Params4bit

    frozen = dict(causal_lm(model).model.layers.named_parameters())
    linear = {name: p for name, p in frozen.items() if name.endswith("base_layer.weight")}
    assert len(linear) == 2 * 7
    assert all(isinstance(p, Params4bit) and p.dtype == torch.uint8 for p in linear.values())


def test_a_fresh_adapter_is_seeded_and_changes_nothing(settings: LanguageModel) -> None:
    first, again, other, bare = (load_model(settings, lora, CPU) for lora in (Lora(), Lora(), Lora(seed=1), None))
    names = language_model.trainable_names(first)
    assert names == language_model.trainable_names(again)
    for name in names:
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    name = next(name for name in sorted(names) if "lora_A" in name)
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert torch.allclose(loss_sum(first, batch()), loss_sum(bare, batch()), rtol=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_full_computation(model: nn.Module, mask_prompt: bool) -> None:
    notes = batch(mask_prompt)
    mask = torch.zeros_like(notes.input_ids)
    for i, length in enumerate(notes.lengths):
        mask[i, :length] = 1
    labels = torch.full_like(notes.input_ids, -100)
    labels.view(-1)[notes.places + 1] = notes.targets
    full = model(input_ids=notes.input_ids, attention_mask=mask, labels=labels).loss * len(notes.targets)
    theirs = gradients(model, full)
    ours = loss_sum(model, notes)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(full.item(), rel=1e-4)
    agree(gradients(model, ours), theirs)


def test_a_head_computed_in_chunks_gives_the_same_loss(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = batch(mask_prompt=False)
    whole = loss_sum(model, notes)
    theirs = gradients(model, whole)
    monkeypatch.setattr(language_model, "LOGIT_ROWS", 7)
    pieces = loss_sum(model, notes)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    agree(gradients(model, pieces), theirs, rel=1e-5)
    with torch.no_grad():
        assert loss_sum(model, notes).item() == pytest.approx(whole.item(), rel=1e-6)


def test_padding_and_other_notes_do_not_change_a_note_s_loss(model: nn.Module) -> None:
    notes = batch()
    alone, width = [], notes.input_ids.shape[1]
    for i, n in enumerate(notes.lengths):
        mine = notes.places // width == i
        places, targets = notes.places[mine] - i * width, notes.targets[mine]
        alone.append(Batch(notes.input_ids[i : i + 1, :n], places, targets, [n], 1, [str(i)]))
    together = loss_sum(model, notes).item()
    assert sum(loss_sum(model, one).item() for one in alone) == pytest.approx(together, rel=1e-5)


def test_packed_notes_have_the_loss_and_the_gradient_of_padded_ones(model: nn.Module) -> None:
    """On a CPU the model pads them again; what a GPU's kernel makes of them, tests/gpu says."""
    padded = loss_sum(model, batch())
    theirs = gradients(model, padded)
    packed = loss_sum(model, batch(packed=True))
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    agree(gradients(model, packed), theirs, rel=1e-5)


def test_recomputation_changes_no_gradient(model: nn.Module, settings: LanguageModel) -> None:
    kept = replace(settings, gradient_checkpointing="auto")
    other = load_model(kept, Lora(), CPU)
    randomise_adapter(other)
    language_model.train_mode(other, kept)
    assert checkpointing(model)
    assert not checkpointing(other), "on a CPU 'auto' keeps everything"
    assert language_model.make_recomputation(other, kept, Lora()) is None
    theirs = gradients(other, loss_sum(other, batch()))
    agree(gradients(model, loss_sum(model, batch())), theirs, rel=1e-5)


@pytest.mark.parametrize("keeping", [1, 2])
def test_any_number_of_layers_can_be_recomputed(model: nn.Module, settings: LanguageModel, keeping: int) -> None:
    theirs = gradients(model, loss_sum(model, batch()))
    language_model.train_mode(model, replace(settings, gradient_checkpointing="auto"))
    layers = causal_lm(model).model.layers
    passes = [0, 0]
    hooks = [layer.register_forward_pre_hook(lambda *_, i=i: count(passes, i)) for i, layer in enumerate(layers)]
    takes = Footprint(layers=2, fixed=0, kept=10, entry=1, work=0)
    notes = batch()
    chosen = Recomputation(layers, takes, takes.peak(notes.input_ids.numel(), keeping))
    agree(gradients(model, loss_sum(model, notes, chosen)), theirs, rel=1e-5)
    for hook in hooks:
        hook.remove()
    assert passes == {1: [2, 1], 2: [1, 1]}[keeping], "the last layers are kept"


def count(passes: list[int], layer: int) -> None:
    passes[layer] += 1


# --- modes ------------------------------------------------------------------------------------------------------------


def checkpointing(model: nn.Module) -> bool:
    """Whether the next training pass will compute activations again."""
    layers = causal_lm(model).model.layers
    states = {bool(layer.gradient_checkpointing and layer.training) for layer in layers}
    assert len(states) == 1
    return states.pop()


def test_checkpointing_is_on_again_after_an_answer(model: nn.Module, settings: LanguageModel) -> None:
    notes = batch()
    before = gradients(model, loss_sum(model, notes))
    language_model.inference_mode(model)
    assert not any(module.training for module in model.modules())
    assert not checkpointing(model)
    model.generate(input_ids=notes.input_ids[:1], max_new_tokens=2, do_sample=False)
    language_model.train_mode(model, settings)
    assert all(module.training for module in model.modules())
    assert checkpointing(model)
    agree(gradients(model, loss_sum(model, notes)), before, rel=1e-6)
