"""What differs between families: numbers beside plain transformers in float32."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import randomise_adapter
from tiny_families import (
    FAMILIES,
    VOCABULARY,
    WINDOW,
    left_padded,
    right_padded,
    tiny_gemma3,
    tiny_model,
    tiny_multimodal,
)
from torch import Tensor, nn
from torch.nn import functional

from medlit.data.collate import Batch
from medlit.errors import UserError
from medlit.model.decoding.kv_cache import Replay, read_prompts
from medlit.model.decoding.likelihood import LabelScorer
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import (
    REPLAY,
    adaptable_layers,
    causal_lm,
    decoder_layers,
    fit_targets,
    has_dropout,
    load_options,
    loaded_part,
    name_in_base,
    peft_targets,
    target_layers,
)
from medlit.model.head import head_logits
from medlit.model.language_model import loss_sum, train_mode, trainable_names
from medlit.model.loading import load_model
from medlit.model.memory import Footprint, Recomputation, footprint, skeleton
from medlit.model.settings import TARGET_MODULES, LanguageModel, Lora

# One token, around the window, and beyond it; the labels' tokens cross it where the prompt stays inside.
LENGTHS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)
LABELS = [[11, 12, 13, 2], [11, 14, 2], [20, 2], [11, 12, 15, 16, 17, 18, 19, 21, 2]]
RUNNING_STATE = ("qwen3_next", "lfm2", "falcon_mamba", "falcon_h1")


def made_prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(30, VOCABULARY - 10, (length,), generator=draw).tolist() for length in LENGTHS]


def plain(model: nn.Module, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token after each one by the model's own forward, (T, V)."""
    return causal_lm(model)(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def label_nats(model: nn.Module, prompt: list[int], label: list[int]) -> Tensor:
    rows = plain(model, prompt + label)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(label)[:, None]).sum()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = tiny_model(request.param)
    if request.param == "bloom":  # the self-check finds this out
        vars(model)[REPLAY] = True
    return model


def test_labels_are_as_likely_as_in_plain_forwards(model: nn.Module) -> None:
    prompts = made_prompts()
    scorer = LabelScorer(model, TokenTrie.of(LABELS))
    ours = scorer.paths(scorer.edges(read_prompts(model, left_padded(prompts))))
    with torch.no_grad():
        theirs = torch.stack([torch.stack([label_nats(model, p, label) for label in LABELS]) for p in prompts])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_loss_and_its_gradient_are_those_of_plain_forwards(model: nn.Module) -> None:
    prompts, label = made_prompts(), LABELS[0]
    batch = right_padded(prompts, label)
    weight = next(p for p in model.parameters() if p.dim() == 1)
    theirs = -torch.stack([label_nats(model, prompt, label) for prompt in prompts]).sum()
    ours = loss_sum(model, batch)
    tokens = len(label) * len(prompts)
    torch.testing.assert_close(ours / tokens, theirs / tokens, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss / tokens, weight)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_plain_forwards(model: nn.Module) -> None:
    prompts = made_prompts()
    prefix, answers = read_prompts(model, left_padded(prompts)), [[*prompt] for prompt in prompts]
    for _ in range(WINDOW):
        with torch.no_grad():
            chosen = head_logits(model, prefix.last).argmax(dim=1)
            for answer, token in zip(answers, chosen.tolist(), strict=True):
                scores = plain(model, answer)[-1]
                assert scores.max() - scores[token] < 1e-4
                answer.append(token)
        prefix = prefix.extend(chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool))


@pytest.mark.parametrize("family", RUNNING_STATE)
def test_a_running_state_is_never_shared(family: str) -> None:
    model = tiny_model(family)
    assert isinstance(read_prompts(model, left_padded(made_prompts())), Replay)


def test_dropout_of_the_base_model_is_seen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    assert not has_dropout(tiny_model("llama"))
    assert has_dropout(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)))
    bloom = tiny_model("bloom")
    assert not has_dropout(bloom)
    bloom.config.hidden_dropout = 0.05  # type: ignore[union-attr]
    assert has_dropout(bloom), "no layer, a rate alone"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recomputed_layers_draw_the_same_dropout(family: str) -> None:
    model = tiny_model(family)
    if family == "llama":
        for layer in decoder_layers(model):
            layer.self_attn.attention_dropout = 0.5  # type: ignore[union-attr, assignment]
        model.config.attention_dropout = 0.5  # type: ignore[union-attr]
    model.train()
    batch = Batch(torch.arange(30, 60)[None], torch.tensor([28]), torch.tensor([7]), [30], 1, ["a"])
    weight = decoder_layers(model)[0].get_parameter("mlp.c_fc.weight" if family == "gpt2" else "mlp.up_proj.weight")
    every = Recomputation(decoder_layers(model), Footprint(4, 0, 2, 1, 1), 0, random=has_dropout(model))
    gradients = []
    for recomputation in (None, every):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(loss_sum(model, batch, recomputation), weight)[0])
    torch.testing.assert_close(*gradients)
    assert every.prepare(30) == 1


OWN = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    "bloom": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "gpt_oss": ["k_proj", "o_proj", "q_proj", "v_proj"],  # neither experts nor router
    "qwen3_next": ["in_proj_ba", "in_proj_qkvz", "k_proj", "o_proj", "out_proj", "q_proj", "v_proj"],
    "lfm2": ["in_proj", "k_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3"],
    "llama4_text": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "falcon_mamba": ["in_proj"],  # its code reads the weights of the others
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_adapts_the_family_s_own_layers(family: str) -> None:
    model = tiny_model(family)
    lora = fit_targets(model, Lora())
    assert lora.target_modules == OWN.get(family, list(TARGET_MODULES))
    chosen = target_layers(model, lora)
    assert all(re.search(r"\.\d\.", name) for name in chosen), "inside the decoder's layers"
    assert fit_targets(model, lora) == lora


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "falcon_mamba"])
@pytest.mark.parametrize("targets", [["q_proj", "no_such"], ["router"], ["lm_head"], "q_projj", "(", ["mlp"]])
def test_names_that_fit_no_layer_are_refused_with_those_that_exist(family: str, targets: list[str] | str) -> None:
    model = tiny_model(family)
    with pytest.raises(UserError, match=r"^model\.lora\.target_modules: .* for an adapter; it has \w.*\w\.$") as found:
        fit_targets(model, Lora(target_modules=targets))
    assert all(name in str(found.value) for name in fit_targets(model, Lora()).target_modules)


def test_nothing_but_the_text_decoder_is_adapted() -> None:
    model = tiny_multimodal()
    assert len(decoder_layers(model)) == 4
    assert not any("vision" in name for name in adaptable_layers(model))
    for lora in (Lora(), Lora(target_modules=["q_proj"]), Lora(target_modules=".*q_proj", layers_to_transform=[1, 3])):
        chosen = target_layers(model, fit_targets(model, lora))
        targets = peft_targets(model, lora)
        names = [name for name, _ in model.named_modules()]
        assert [name for name in names if re.fullmatch(targets["target_modules"], name)] == list(chosen)
        assert targets["layers_to_transform"] is None
    assert {name.split(".")[3] for name in chosen} == {"1", "3"}


def test_a_vision_tower_inside_the_decoder_is_not_adapted() -> None:
    from transformers import GitConfig, GitForCausalLM

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    with torch.device("meta"):
        git = GitForCausalLM(GitConfig(vision_config=shape, vocab_size=64, **shape))  # type: ignore[arg-type]
    assert {name.partition(".layer.")[0] for name in adaptable_layers(git)} == {"git.encoder"}


def test_attention_to_an_encoder_that_is_not_there_is_not_adapted() -> None:
    """Its adapters would get no gradient, which several processes cannot train."""
    from transformers import BartConfig, BartForCausalLM

    bart = BartForCausalLM(BartConfig(vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=2))
    assert any("encoder_attn.q_proj" in name for name, _ in bart.named_modules())
    assert {name.split(".layers.0.")[1] for name in adaptable_layers(bart)} == {
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *("fc1", "fc2"),
    }


def test_a_grouped_projection_is_not_adapted() -> None:
    """An adapter's matrices, of its whole width, do not take its groups."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(num_hidden_layers=1, vocab_size=64, n_routed_experts=2))
    names = {name.rpartition(".")[2] for name in adaptable_layers(model)}
    assert {"q_a_proj", "o_b_proj"} <= names
    assert "o_a_proj" not in names


def test_a_text_part_inside_another_model() -> None:
    from transformers import Gemma3Config

    model: Any = tiny_multimodal()
    assert loaded_part(model.config) is model.config, "Mistral 3's text part has no separate class"
    assert footprint(model.config, 0, 0).layers == 4
    assert {name for name, _ in skeleton(model.config).named_parameters()} == {
        name for name, _ in model.named_parameters()
    }
    text: Any = tiny_model("gemma3_text").config
    nested = Gemma3Config(text_config=text.to_dict())
    assert loaded_part(nested).model_type == "gemma3_text"
    assert load_options(nested, on_gpu=True) == {"text_only": True}


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4", "qwen3_5"])
def test_the_layers_of_a_text_part_are_found_in_the_whole_model(family: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config: Any = CONFIG_MAPPING[family](text_config={"num_hidden_layers": 4})
    part = skeleton(config)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config)  # as PEFT alone loads it
    layers = adaptable_layers(part)
    assert layers
    for name, layer in layers.items():
        found = whole.get_submodule(in_base := name_in_base(part, name))
        assert found.weight.shape == layer.weight.shape
        assert name_in_base(part, in_base, back=True) == name
        assert name_in_base(part, f"base_model.model.{name}") == f"base_model.model.{in_base}"


def test_a_text_part_s_layers_are_named_as_there_or_as_in_the_whole_model() -> None:
    part = skeleton(tiny_gemma3().config)  # type: ignore[arg-type]
    names = ["model.layers.1.mlp.up_proj"], ["model.language_model.layers.1.mlp.up_proj"]
    for targets in (*names, names[0][0], names[1][0], r"model\.language_model\.layers\.1\.mlp\.up_proj|no_such"):
        lora = fit_targets(part, Lora(target_modules=targets))
        assert target_layers(part, lora).keys() == set(names[0])
    assert fit_targets(part, Lora(rank_pattern={r"layers\.1\..*up_proj": 2}))
    for pattern in (names[0][0], names[1][0], r"model\.layers\.1\..*|up_proj"):
        for setting in ("rank_pattern", "alpha_pattern"):
            with pytest.raises(UserError, match=rf"^model\.lora\.{setting}: .* it has down_proj, "):
                fit_targets(part, Lora(**{setting: {pattern: 2}}))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_whole_model_that_needs_another_package_is_refused_by_its_name() -> None:
    from transformers import Gemma3nConfig

    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .* requires the timm library .*\.$"):
        skeleton(Gemma3nConfig())


@pytest.mark.parametrize("name", ["T5Config", "BartConfig", "ViTConfig", "Wav2Vec2Config"])
def test_what_is_no_decoder_is_refused(name: str) -> None:
    import transformers

    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: '.*' models are not decoders"):
        skeleton(getattr(transformers, name)())


def test_a_capped_attention_is_not_left_to_sdpa_on_a_cpu() -> None:
    config = tiny_model("gemma2").config
    assert load_options(config, on_gpu=False) == {"attn_implementation": "eager"}
    assert load_options(config, on_gpu=True) == {}


VARIANTS = {
    "DoRA and rsLoRA": Lora(r=4, alpha=8, dora=True, rslora=True),
    "biases of adapted layers": Lora(r=4, bias="lora_only"),
    "all biases and dropout": Lora(r=4, bias="all", dropout=0.3),
}
QUICK = ("gpt2", "phi3", "gemma3_text")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_an_adapter_trains_as_peft_trains_it(llama: Path, tmp_path: Path, family: str, variant: str) -> None:
    """Loss and gradient, recomputed in the backward pass here and not there."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_model(family).save_pretrained(tmp_path)  # type: ignore[operator]
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    settings = LanguageModel(str(tmp_path), max_length=64, load_in_4bit=False, gradient_checkpointing="unsloth")
    lora = VARIANTS[variant]
    ours: Any = load_model(settings, lora, torch.device("cpu"))
    attention = causal_lm(ours).config._attn_implementation
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    names = OWN.get(family, list(TARGET_MODULES))
    theirs: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora.as_peft() | {"target_modules": names}))
    assert trainable_names(ours) == trainable_names(theirs)
    randomise_adapter(ours)
    theirs.load_state_dict({name: ours.get_parameter(name) for name in trainable_names(ours)}, strict=False)
    ids = torch.arange(20, 50).view(2, 15)
    places, targets = torch.tensor([12, 13, 27, 28]), torch.tensor([5, 6, 7, 8])
    train_mode(ours, settings)
    torch.manual_seed(1)
    loss = loss_sum(ours, Batch(ids, places, targets, [15, 15], 4, ["", ""])) / 4
    loss.backward()  # type: ignore[no-untyped-call]
    theirs.train()
    torch.manual_seed(1)
    rows = theirs(input_ids=ids, use_cache=False).logits.flatten(0, 1)[places]
    reference = functional.cross_entropy(rows, targets)
    reference.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    for name in trainable_names(ours):
        gradient, expected = (model.get_parameter(name).grad for model in (ours, theirs))
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
        assert gradient is not None or ".lora_" not in name, "an adapter that nothing reaches"


def test_the_text_decoder_of_another_model_is_trained(llama: Path, tmp_path: Path) -> None:
    tiny_multimodal().save_pretrained(tmp_path)  # type: ignore[operator]
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    for in_4bit in (False, True):
        settings = LanguageModel(str(tmp_path), max_length=64, load_in_4bit=in_4bit)
        trained = trainable_names(load_model(settings, Lora(), torch.device("cpu")))
        assert len(trained) == 2 * 7 * 4
        assert all(".language_model.layers." in name for name in trained)
