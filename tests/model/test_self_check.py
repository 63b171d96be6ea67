"""The self-check: right families pass, a number made wrong on purpose is refused or computed another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import pytest
import torch
from fakes import randomise_adapter
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn

from medlit.atomic_io import write_json
from medlit.errors import UserError
from medlit.model import language_model
from medlit.model.decoding import kv_cache, likelihood
from medlit.model.families import REPLAY, decoder_layers, fit_targets, peft_targets, sliding_window
from medlit.model.head import head_logits
from medlit.model.language_model import loss_sum
from medlit.model.self_check import Compared, check_numbers, compare
from medlit.model.settings import LanguageModel, Lora

SETTINGS = LanguageModel("tiny", max_length=64)
COMMON = 32  # tokens of a beginning that a CPU computes once, at this length
WITHOUT_STOCK = "is checked without stock classes"
# Modules that Unsloth patches on a GPU.
LLAMA, GEMMA2 = (f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gemma2"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("medlit.model.self_check.write_json", lambda *_: None)  # no check counts for a second model


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "medlit")
    model = tiny_model(family)
    check_numbers(model, SETTINGS)
    assert WITHOUT_STOCK not in caplog.text
    replayed = ("bloom", "qwen3_next", "lfm2", "falcon_mamba", "falcon_h1", "llama4_text")
    assert vars(model)[REPLAY] == (family in replayed)


def adapted(model: nn.Module, **settings: Any) -> nn.Module:  # noqa: ANN401 - Lora's own
    lora = fit_targets(model, Lora(**settings))
    return get_peft_model(model, LoraConfig(**lora.as_peft() | peft_targets(model, lora))).eval()  # type: ignore[arg-type]


def worst(model: nn.Module, of: str = "") -> float:
    """The greatest difference as a part of what is allowed; 1 is refused."""
    return max(apart / allowed for what, apart, allowed in compare(model, SETTINGS)[0] if what.startswith(of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_numbers_are_far_from_being_refused(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    vars(model)[REPLAY] = family == "bloom"
    model = adapted(model)
    assert worst(model) < 0.6
    assert any(each.what == "a batch's loss in training" for each in compare(model, SETTINGS)[0])


@pytest.mark.parametrize("scale", [0.97, 1.02])
@pytest.mark.parametrize("module", [likelihood, language_model], ids=["answers", "loss"])
def test_scaled_logits_show_in_bfloat16(module: Any, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    model = tiny_model("opt").bfloat16()
    monkeypatch.setattr(module, "head_logits", lambda *given: scale * head_logits(*given))
    assert worst(model) > 1.2


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_a_window_off_by_one_token_shows_in_bfloat16(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "sliding_window", lambda model: change + (sliding_window(model) or 0))
    assert worst(tiny_model("mistral").bfloat16()) > 1.2


def test_4_bit_layers_that_compute_in_bfloat16_are_held_to_bfloat16() -> None:
    # As repositories of 4-bit weights are on a CPU, where all else is in float32.
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = tiny_model("llama")
    for layer in decoder_layers(model):
        for name in ("gate_proj", "up_proj"):
            old = getattr(layer.mlp, name)
            new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16)
            new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.mlp, name, new.to("cpu"))
    check_numbers(model, replace(SETTINGS, max_length=512))


def test_a_wrong_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model: nn.Module, hidden: Tensor) -> Tensor:
        return 2 * head_logits(model, hidden)

    monkeypatch.setattr(likelihood, "head_logits", doubled)
    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .* differs by [\d.]+ nats; choose"):
        check_numbers(tiny_model("llama"), SETTINGS)


def test_a_wrong_scale_in_the_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.model.language_model.head_logits", lambda *given: head_logits(*given) / 2)
    with pytest.raises(UserError, match=r": a batch's loss differs by [\d.]+ nats; choose"):
        check_numbers(tiny_model("llama"), SETTINGS)


def _without_cap(stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: stock(*given, **{**named, "softcap": None})


def _without_window(stock: Callable[..., Any]) -> Callable[..., Any]:
    return resolve_name(f"{GEMMA2}.create_causal_mask")  # type: ignore[no-any-return]


def _with_pattern(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A body that slides in the layers where its author thinks that the family does."""

    def forward(self: Any, *given: object, **named: object) -> Any:  # noqa: ANN401
        config, self.config = self.config, copy.deepcopy(self.config)
        self.config.layer_types = ["full_attention", "sliding_attention"] * 2
        try:
            return stock(self, *given, **named)
        finally:
            self.config = config

    return forward


def _without_positions(stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda queries, keys, *_, **__: (queries, keys)


def _with_scale(stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, hidden_states, **named: stock(self, 1.5 * hidden_states, **named)


@pytest.mark.parametrize(
    ("family", "name", "wrong"),
    [
        ("llama", f"{LLAMA}.apply_rotary_pos_emb", _without_positions),
        ("llama", f"{LLAMA}.LlamaAttention.forward", _with_scale),
        ("llama", f"{LLAMA}.LlamaMLP.forward", _with_scale),
        ("gemma2", f"{GEMMA2}.Gemma2Model.forward", _with_pattern),
        ("gemma2", f"{GEMMA2}.create_sliding_window_causal_mask", _without_window),
        ("gemma2", f"{GEMMA2}.eager_attention_forward", _without_cap),
    ],
    ids=["positions", "attention", "MLP", "pattern", "window", "cap"],
)
def test_a_fault_in_the_loaded_classes_is_refused(
    family: str, name: str, wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    monkeypatch.setattr(name, wrong(resolve_name(name)))
    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .* differs by [\d.]+ nats; choose"):
        check_numbers(model, SETTINGS)


def test_an_adapter_stays_and_replaced_methods_of_modules_do_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "medlit")
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "down_proj"])).eval()  # type: ignore[arg-type]
    randomise_adapter(model)
    check_numbers(model, SETTINGS)
    assert WITHOUT_STOCK not in caplog.text
    module: Any = decoder_layers(model)[1].mlp
    module.forward = MethodType(_with_scale(type(module).forward), module)
    with pytest.raises(UserError, match=r" differs by [\d.]+ nats; choose"):
        check_numbers(model, SETTINGS)


def test_a_fault_in_training_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = resolve_name(f"{LLAMA}.LlamaMLP.forward")
    monkeypatch.setattr(f"{LLAMA}.LlamaMLP.forward", lambda self, x: stock(self, (1.5 if self.training else 1) * x))
    check_numbers(tiny_model("llama"), SETTINGS)  # of a bare model nothing is trained
    with pytest.raises(UserError, match=r": a batch's loss in training differs by [\d.]+ nats; choose"):
        check_numbers(adapted(tiny_model("llama")), SETTINGS)


def test_an_update_that_is_added_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Linear.forward

    def twice(self: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return 2 * stock(self, x) - self.base_layer(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(Linear, "forward", twice)
    with pytest.raises(UserError, match=r" differs by [\d.]+ nats; choose"):
        check_numbers(adapted(tiny_model("llama")), SETTINGS)


@pytest.mark.parametrize("variant", [{"dora": True}, {"rslora": True}, {"r": 4, "alpha": 64}, {"dropout": 0.5}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_pass_and_stay_as_they_are(family: str, variant: dict[str, Any]) -> None:
    model = adapted(tiny_model(family), **variant).train()
    layer: Any = decoder_layers(model)[0]
    if family == "llama":
        layer.self_attn.attention_dropout = 0.5
    randomise_adapter(model)
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    check_numbers(model, SETTINGS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert family != "llama" or layer.self_attn.attention_dropout == 0.5
    rates = {part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    assert rates <= {0.0, 0.1, 0.5}
    assert "dropout" not in variant or 0.5 in rates
    assert worst(model.eval()) < 0.6


def test_packed_notes_are_compared_where_a_model_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.model.self_check.can_pack", lambda model: True)  # computed padded, as this is a CPU
    found, _ = compare(adapted(tiny_model("mistral")), SETTINGS)
    names = [each.what for each in found]
    assert names.count("a packed batch's loss") == names.count("a batch's loss in training") == 3
    assert all(isinstance(each, Compared) and each.apart < each.allowed for each in found)


def test_another_adapter_is_checked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("medlit.model.self_check.write_json", write_json)
    for count, model in enumerate(
        [
            tiny_model("llama"),
            adapted(tiny_model("llama")),
            adapted(tiny_model("llama"), target_modules=["q_proj"]),
            adapted(tiny_model("llama"), target_modules=["q_proj"], layers_to_transform=[1]),
            adapted(tiny_model("llama"), dora=True),
        ],
        start=1,
    ):
        check_numbers(model, SETTINGS)
        assert len(list((tmp_path / "cache" / "checked").iterdir())) == count


def test_an_adapter_and_dropout_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model("llama"), dropout=0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def fail(model: nn.Module, *_: object) -> None:
        if model.training:
            raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr("medlit.model.self_check.loss_sum", lambda *given: fail(*given) or loss_sum(*given))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        check_numbers(model, SETTINGS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.5}


def test_a_label_one_position_late_shows_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = kv_cache.KVCache.look_ahead
    monkeypatch.setattr(
        kv_cache.KVCache, "look_ahead", lambda self, t, offsets, attends: stock(self, t, offsets + 1, attends)
    )
    assert worst(tiny_model("llama").bfloat16()) > 1.2


def test_a_model_that_stock_classes_do_not_fit_is_compared_with_itself(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "medlit")

    def refuse(**_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("medlit.model.self_check.init_empty_weights", refuse)
    check_numbers(tiny_model("llama"), SETTINGS)
    assert WITHOUT_STOCK in caplog.text


def test_a_window_or_mask_that_no_other_way_mends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.model.self_check.shares_prompts", lambda model: False)
    monkeypatch.setattr(
        kv_cache, "append_tokens", lambda ids, lengths, *_: (ids, torch.ones_like(ids, dtype=torch.bool))
    )
    with pytest.raises(UserError, match=r"^model\.language_model\.base_model: .*; choose another base model\.$"):
        check_numbers(tiny_model("mistral"), SETTINGS)


def test_a_wrong_window_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "sliding_window", lambda model: 1 + (sliding_window(model) or 0))
    model = tiny_model("mistral")
    check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def test_a_mask_that_is_dropped_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache.KVCache, "layer_masks", lambda *_: None)
    model = tiny_model("llama")
    check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def _is_row(named: dict[str, Any]) -> bool:
    """Whether a body computes the notes of a batch in one row after their common beginning, as on a CPU."""
    return named.get("past_key_values") is None and named.get("attention_mask") is not None


def _later_in_a_row(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, **named: Any) -> Any:  # noqa: ANN401
        if _is_row(named):
            named["position_ids"] = named["position_ids"] + (named["position_ids"] >= COMMON)
        return stock(self, **named)

    return forward


def _without_walls_in_a_row(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, **named: Any) -> Any:  # noqa: ANN401
        if _is_row(named):
            named["attention_mask"] = torch.full_like(named["attention_mask"], -1e9).triu(1)
        return stock(self, **named)

    return forward


def _later_after_a_cache(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)  # still one of transformers
    def forward(self: Any, **named: Any) -> Any:  # noqa: ANN401
        if (cache := named.get("past_key_values")) is not None and cache.get_seq_length() == COMMON:
            named["position_ids"] = 1 + COMMON + torch.arange(named["input_ids"].shape[1])[None]
        return stock(self, **named)

    return forward


@pytest.mark.parametrize("wrong", [_later_in_a_row, _without_walls_in_a_row])
def test_a_fault_in_a_row_after_a_common_beginning_is_refused(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{LLAMA}.LlamaModel.forward", wrong(resolve_name(f"{LLAMA}.LlamaModel.forward")))
    with pytest.raises(UserError, match=r": a batch's loss differs by [\d.]+ nats; choose"):
        check_numbers(tiny_model("llama"), SETTINGS)


def test_a_fault_after_the_cache_of_a_common_beginning_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{LLAMA}.LlamaModel.forward"
    monkeypatch.setattr(name, _later_after_a_cache(resolve_name(name)))
    model = tiny_model("llama")
    check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY]


def test_a_check_is_announced_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medlit.model.self_check.write_json", write_json)
    check_numbers(tiny_model("bloom"), SETTINGS)
    assert capsys.readouterr().err.startswith("medlit: checking that tiny gives the numbers of plain transformers; ")
    [record] = (tmp_path / "cache" / "checked").iterdir()
    assert record.read_text().split() == ["{", '"replay":', "true", "}"]
    model = tiny_model("bloom")
    with monkeypatch.context() as patch:
        patch.setattr("medlit.model.self_check.loss_sum", lambda *_: pytest.fail("checked again"))
        check_numbers(model, replace(SETTINGS, gradient_checkpointing="none"))  # no layer is recomputed in either
        with pytest.raises(pytest.fail.Exception):
            check_numbers(tiny_model("bloom"), replace(SETTINGS, gradient_checkpointing="unsloth"))
        capsys.readouterr()
    assert vars(model)[REPLAY]
    assert capsys.readouterr().err == ""


def test_a_check_without_stock_classes_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may have lacked memory only; compared with itself a model is always right."""
    monkeypatch.setattr("medlit.model.self_check.write_json", write_json)
    with monkeypatch.context() as patch:
        patch.setattr("medlit.model.self_check.stock_class", {}.__getitem__)
        check_numbers(tiny_model("llama"), SETTINGS)
    records = tmp_path / "cache" / "checked"
    assert not records.exists()
    check_numbers(tiny_model("llama"), SETTINGS)
    assert len(list(records.iterdir())) == 1


def test_a_cache_that_may_not_be_written_forgets_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("medlit.model.self_check.write_json", write_json)
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path))
    monkeypatch.setattr("medlit.errors.WARNED", set())
    (tmp_path / "checked").touch()  # root may write anywhere, but not into a file
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="medlit continues without the record of its check of numbers"):
        check_numbers(model, SETTINGS)
    assert vars(model)[REPLAY] is False


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_of_the_same_shape_are_checked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr("medlit.model.self_check.write_json", write_json)
    model, folder = tiny_model("llama"), tmp_path / "base"
    model.save_pretrained(folder)  # type: ignore[operator]
    records = tmp_path / "cache" / "checked"
    for count in (1, 1, 2):
        if count == 2:
            (folder / name).open("ab").write(b" ")
        check_numbers(model, LanguageModel(str(folder), max_length=64))
        assert len(list(records.iterdir())) == count
