"""The language model behind Unsloth, for real: NF4 weights, LoRA and modes on the CPU, with a two-layer Llama."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_tokenizers import byte_tokenizer
from fakes import randomise_adapter
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model
from torch import Tensor, nn

from medlit.data.collate import Batch, Collator, TokenisedNote
from medlit.errors import UserError
from medlit.model import language_model
from medlit.model.families import causal_lm
from medlit.model.language_model import Fp8Linear, check_fp8, default_precision, loss_sum
from medlit.model.loading import load_model
from medlit.model.memory import Footprint, Recomputation
from medlit.model.settings import LanguageModel, Lora

if TYPE_CHECKING:
    from conftest import Fp8Call

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


# --- FP8 --------------------------------------------------------------------------------------------------------------

FP8 = {"load_in_4bit": False, "load_in_fp8": True}


def fp8_layers(model: nn.Module) -> dict[str, Fp8Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, Fp8Linear)}


def expand(model: nn.Module) -> None:
    """Hold the rounded weights as numbers of the model's own format."""
    for name, layer in fp8_layers(model).items():
        plain = nn.Linear(1, 1, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.eval().weight, requires_grad=False), layer.bias
        model.set_submodule(name, plain)


@given(st.integers(0, 2**16), st.floats(1e-6, 1e4))
def test_rounding_to_fp8_is_small_and_done_once(seed: int, size: float) -> None:
    layer = nn.Linear(24, 5, bias=False)
    weight = size * torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    weight[seed % 5] = 0
    layer.weight.data = weight.clone()
    Fp8Linear.convert(layer)
    once = layer.eval().weight
    # Three bits of a fraction; what is 2^14 times smaller than the largest of its row has fewer.
    assert ((once - weight).abs() <= weight.abs() / 16 + weight.abs().amax(dim=1, keepdim=True) * 2**-17).all()
    again = nn.Linear(24, 5, bias=False)
    again.weight.data = once.clone()
    Fp8Linear.convert(again)
    assert torch.equal(again.eval().weight, once)


def test_a_copy_in_fp8_reads_its_own_codes() -> None:
    layer = nn.Linear(8, 4)
    Fp8Linear.convert(layer)
    copied = copy.deepcopy(layer).eval()
    assert torch.equal(copied.weight, layer.eval().weight)
    copied.codes.zero_()
    assert not copied.weight.any()
    assert layer.weight.any()


def test_every_linear_layer_of_the_decoder_is_held_in_bytes_and_nothing_else(settings: LanguageModel) -> None:
    model = load_model(replace(settings, **FP8), Lora(), CPU)
    layers = fp8_layers(model)
    assert len(layers) == 2 * 7
    assert all(name.endswith(".base_layer") for name in layers)
    assert {layer.codes.dtype for layer in layers.values()} == {torch.uint8}
    assert language_model.trainable_names(model) == language_model.trainable_names(load_model(settings, Lora(), CPU))
    assert len(fp8_layers(load_model(replace(settings, **FP8), None, CPU))) == 2 * 7, "the bare base model too"


def test_the_rounded_weights_are_the_same_in_every_format() -> None:
    """Also where a model answers on another device than the one that it was trained on."""
    layers = {dtype: nn.Linear(64, 32, bias=False) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    weight = (0.02 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    for dtype, layer in layers.items():
        layer.weight = nn.Parameter(weight.to(dtype))
        Fp8Linear.convert(layer)
        layer.eval()
    wide = layers[torch.float32].weight
    for dtype, layer in layers.items():
        assert torch.equal(layer.weight, wide.to(dtype))


def test_answers_are_those_of_the_rounded_weights(settings: LanguageModel) -> None:
    models = [load_model(replace(settings, load_in_4bit=False, load_in_fp8=on), Lora(), CPU) for on in (True, False)]
    for each in models:
        randomise_adapter(each)
        language_model.inference_mode(each)
    with torch.no_grad():
        rounded, plain = (loss_sum(each, batch()).item() for each in models)
        expand(models[0])
        assert loss_sum(models[0], batch()).item() == rounded
    assert rounded == pytest.approx(plain, rel=0.02)
    assert rounded != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_runs_unsloths_kernel_on_fp8_weights(tmp_path: Path, fp8_kernel: list[Fp8Call], family: str) -> None:
    """qwen2 has biases."""
    tiny_model(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = LanguageModel(str(tmp_path), max_length=256, **FP8)  # type: ignore[arg-type]
    model = load_model(settings, Lora(), CPU)
    randomise_adapter(model)
    language_model.train_mode(model, settings)
    assert not fp8_kernel, "the check of the numbers is no training"
    ours = loss_sum(model, batch())
    found = gradients(model, ours)
    assert len(fp8_kernel) == len(fp8_layers(model))
    for weight, scale in fp8_kernel:
        assert weight.dtype == torch.float8_e4m3fn
        assert scale.shape == (len(weight), 1)
    expand(model)
    language_model.train_mode(model, settings)
    theirs = loss_sum(model, batch())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    agree(found, gradients(model, theirs))


@pytest.mark.parametrize(
    ("settings_of", "lora", "trained_on", "message"),
    [
        ({"load_in_4bit": True}, Lora(), None, "not together with load_in_4bit; set one of them to false"),
        *(
            ({}, lora, None, "not together with DoRA or trained biases; set it to false, or leave those out")
            for lora in (Lora(dora=True), Lora(bias="all"))
        ),
        *(
            ({"dtype": dtype}, Lora(), None, "computes in bfloat16; set model.language_model.dtype to 'auto'")
            for dtype in ("float16", "float32")
        ),
        ({}, Lora(), CPU, r"trains on GPUs from compute capability 8\.9 on \(L40S, H100\); set it to false"),
        ({}, Lora(), torch.device("cuda"), "trains on GPUs from compute capability"),
    ],
)
def test_what_fp8_weights_do_not_go_with_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    settings_of: dict[str, Any],
    lora: Lora,
    trained_on: torch.device | None,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    settings = LanguageModel(**FP8 | settings_of)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^model\.language_model\.load_in_fp8: {message}"):
        check_fp8(settings, lora, trained_on)
    check_fp8(replace(settings, load_in_fp8=False), lora, trained_on)
    if trained_on is None:
        with pytest.raises(UserError, match=rf"^model\.language_model\.load_in_fp8: {message}"):
            load_model(settings, lora, CPU)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_fp8_weights_train_on_newer_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for lora in (Lora(), None):
        check_fp8(LanguageModel(**FP8), lora, torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "bf16", "precision"),
    [
        ("auto", True, "bf16-mixed"),
        ("auto", False, "16-mixed"),
        ("float16", True, "16-mixed"),
        ("bfloat16", False, "bf16-mixed"),
        ("float32", True, "bf16-mixed"),
    ],
)
def test_autocast_takes_the_format_of_the_frozen_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: str, bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert default_precision(on_gpu=True, dtype=dtype) == precision
    assert default_precision(on_gpu=False, dtype=dtype) == "32-true"


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
