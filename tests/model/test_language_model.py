"""The language model behind Unsloth, for real: NF4 weights, LoRA and modes on the CPU, with a two-layer Llama."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import write_llama
from torch import Tensor, nn

from medlit.data.collate import Batch, Collator, Row
from medlit.errors import UserError
from medlit.model import adapter as adapters
from medlit.model import language_model as language_model
from medlit.model import loading
from medlit.model.language_model import causal_lm, loss_sum
from medlit.model.memory import Footprint, Recomputation
from medlit.model.settings import LanguageModel, Lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(llama: Path) -> LanguageModel:
    return LanguageModel(str(llama), max_length=256, gradient_checkpointing="unsloth")


@pytest.fixture(scope="module")
def loaded(settings: LanguageModel) -> nn.Module:
    return loading.load(settings, Lora(), CPU)


@pytest.fixture
def model(loaded: nn.Module, settings: LanguageModel) -> nn.Module:
    """The tiny model, ready to train, its adapter no longer the identity that a fresh one is."""
    stir(loaded)
    language_model.train_mode(loaded, settings)
    return loaded


def stir(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)


def batch(loss_on: str = "response", *, packed: bool = False) -> Batch:
    """Four notes of unlike length with answers of unlike length."""
    draw = torch.Generator().manual_seed(0)
    answers = {name: torch.randint(3, 250, (n,), generator=draw).tolist() for name, n in (("a", 2), ("b", 7), ("c", 4))}
    rows = [
        Row(
            row=i,
            id=str(i),
            input_ids=torch.randint(3, 250, (n,), generator=draw).tolist(),
            cut_tokens=0,
            specialty=name,
        )
        for i, (n, name) in enumerate([(30, "a"), (11, "b"), (55, "c"), (42, "a")])
    ]
    collator = Collator(answers.__getitem__, 0, loss_on)  # type: ignore[arg-type]
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
    model = loading.load(settings, Lora(r=4, target_modules=["q_proj", "up_proj"]), CPU)
    stir(model)
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
    first, again, other, bare = (loading.load(settings, lora, CPU) for lora in (Lora(), Lora(), Lora(seed=1), None))
    names = language_model.trainable_names(first)
    assert names == language_model.trainable_names(again)
    for name in names:
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    name = next(name for name in sorted(names) if "lora_A" in name)
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert torch.allclose(loss_sum(first, batch()), loss_sum(bare, batch()), rtol=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["response", "whole"])
def test_the_loss_and_its_gradient_are_those_of_the_full_computation(model: nn.Module, loss_on: str) -> None:
    notes = batch(loss_on)
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


def test_a_head_in_pieces_is_the_same_head(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = batch("whole")
    whole = loss_sum(model, notes)
    theirs = gradients(model, whole)
    monkeypatch.setattr(language_model, "_LOGIT_ROWS", 7)
    pieces = loss_sum(model, notes)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    agree(gradients(model, pieces), theirs, rel=1e-5)
    with torch.no_grad():
        assert loss_sum(model, notes).item() == pytest.approx(whole.item(), rel=1e-6)


def test_padding_and_company_do_not_change_a_note_s_loss(model: nn.Module) -> None:
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


def test_computing_activations_again_changes_no_gradient(model: nn.Module, settings: LanguageModel) -> None:
    kept = replace(settings, gradient_checkpointing="auto")
    other = loading.load(kept, Lora(), CPU)
    stir(other)
    language_model.train_mode(other, kept)
    assert checkpointing(model)
    assert not checkpointing(other), "on a CPU 'auto' keeps everything"
    assert language_model.recomputation(other, kept, Lora()) is None
    theirs = gradients(other, loss_sum(other, batch()))
    agree(gradients(model, loss_sum(model, batch())), theirs, rel=1e-5)


@pytest.mark.parametrize("keeping", [1, 2])
def test_any_layers_can_be_computed_again(model: nn.Module, settings: LanguageModel, keeping: int) -> None:
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
    language_model.answer_mode(model)
    assert not any(module.training for module in model.modules())
    assert not checkpointing(model)
    model.generate(input_ids=notes.input_ids[:1], max_new_tokens=2, do_sample=False)
    language_model.train_mode(model, settings)
    assert all(module.training for module in model.modules())
    assert checkpointing(model)
    agree(gradients(model, loss_sum(model, notes)), before, rel=1e-6)


# --- the adapter folder -----------------------------------------------------------------------------------------------


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return causal_lm(model)(input_ids=batch().input_ids).logits


def test_peft_alone_loads_the_adapter_to_the_same_logits(
    model: nn.Module, settings: LanguageModel, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapters.save_adapter(model, tmp_path, "owner/name", "v1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    read = PeftModel.from_pretrained(loading.load(settings, None, CPU), tmp_path)
    language_model.answer_mode(model)
    assert torch.allclose(logits(model), logits(read), atol=1e-6)
    assert model.peft_config["default"].base_model_name_or_path == settings.base_model, "as it was"


def test_an_adapter_that_was_saved_is_the_same_when_loaded(
    model: nn.Module, settings: LanguageModel, tmp_path: Path
) -> None:
    adapters.save_adapter(model, tmp_path, "owner/name", None)
    fresh = loading.load(settings, Lora(seed=9), CPU)
    adapters.load_adapter(fresh, tmp_path)
    for name in language_model.trainable_names(model):
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize(
    "lora", [Lora(r=8), Lora(target_modules=["q_proj"]), Lora(target_modules=["o_proj", "q_proj"])]
)
def test_an_adapter_of_another_shape_is_refused(
    model: nn.Module, settings: LanguageModel, tmp_path: Path, lora: Lora
) -> None:
    adapters.save_adapter(loading.load(settings, lora, CPU), tmp_path, "owner/name", None)
    with pytest.raises(UserError, match=r"model\.adapter: .*fit"):
        adapters.load_adapter(model, tmp_path)


def test_an_adapter_of_a_wider_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    wide = LanguageModel(str(write_llama(tmp_path / "wide", hidden=128)), max_length=256)
    adapters.save_adapter(loading.load(wide, Lora(), CPU), tmp_path / "adapter", "owner/name", None)
    with pytest.raises(UserError, match=r"model\.adapter: the weights in .* do not fit"):
        adapters.load_adapter(model, tmp_path / "adapter")


def test_a_broken_or_missing_adapter_is_refused(model: nn.Module, tmp_path: Path) -> None:
    adapters.save_adapter(model, tmp_path / "whole", "owner/name", None)
    short = shutil.copytree(tmp_path / "whole", tmp_path / "short") / "adapter_model.safetensors"
    short.write_bytes(short.read_bytes()[:1000])
    for folder in (short.parent, tmp_path / "none"):
        with pytest.raises(UserError, match=r"model\.adapter: .* is missing or broken"):
            adapters.load_adapter(model, folder)


def test_an_adapter_is_looked_for_in_a_folder_and_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.adapter: .* holds no adapter_config\.json"):
        adapters.adapter_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.adapter: \./nowhere holds no adapter_config\.json"):
        adapters.adapter_folder("./nowhere")
    with pytest.raises(UserError, match="owner/no-such-adapter is neither a folder nor to be had from the Hub"):
        adapters.adapter_folder("owner/no-such-adapter")
    (tmp_path / "adapter_config.json").touch()
    assert adapters.adapter_folder(str(tmp_path)) == tmp_path
