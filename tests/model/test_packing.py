"""Attention over packed notes: what the kernels are given, against note by note; the kernels themselves need a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import FAMILIES, WINDOW, left_padded, right_padded, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medlit.data.collate import Collator, TokenisedNote
from medlit.errors import UserError
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.families import body, causal_lm, decoder_layers, packing_route
from medlit.model.language_model import loss_sum
from medlit.model.packing import (
    BLOCK,
    MULTIPLE,
    PACKS,
    block_masks,
    can_pack,
    enable_last_layer,
    enable_packing,
    route,
    route_stock_layers,
    share_beginning,
    softcapped,
    states_read,
)
from medlit.unsloth_first import import_unsloth

LENGTHS = [5, 1, 9, 6, 30]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    cap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """One note's, written out: (1, heads, T, D) to (1, T, heads, D)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or query.shape[3] ** -0.5)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    hidden = (distance < 0) | (distance >= (window or query.shape[2]))
    return (scores.masked_fill(hidden, -torch.inf).softmax(dim=3) @ value).transpose(1, 2)


def by_part(*tensors: Tensor, window: int | None, scale: float | None = None) -> Tensor:
    """What the varlen kernel computes, part by part: (T, heads, D)."""
    query, key, value, starts, key_starts = tensors
    out = []
    for (start, end), (first, last) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        keys, values = (x[first:last].transpose(0, 1)[None] for x in (key, value))
        queries = functional.pad(query[start:end].transpose(0, 1)[None], (0, 0, last - first - end + start, 0))
        out.append(attention(queries, keys, values, window, scale=scale)[0, last - first - end + start :])
    return torch.cat(out)


def stock(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
    """Unsloth's call for a batch of one length: (B, heads, T, D) to (B, T, heads, D)."""
    return functional.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True).transpose(1, 2)


def call(query: Tensor, key: Tensor, value: Tensor, mask: Any, window: int | None = None) -> Tensor:  # noqa: ANN401
    attend = route(stock, by_part)
    context = SimpleNamespace(causal_mask=mask, sliding_window=window)
    return attend(config=None, context=context, Q=query, K=key, V=value)


def random_heads(tokens: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 16, generator=draw) for heads in (4, 2, 2))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(0, 12),
    st.integers(0, 9),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([MULTIPLE, BLOCK]),
)
def test_a_packed_note_attends_as_alone(
    rests: list[int], shared: int, filler: int, window: int | None, multiple: int
) -> None:
    lengths = [shared + rest for rest in rests]
    tokens = sum(lengths)
    row = share_beginning(lengths, shared, len(lengths) + 4, torch.device("cpu"), multiple)
    real = tokens - (len(lengths) - 1) * shared
    assert len(row.computed) == -(-real // multiple) * multiple
    assert row.key_starts.diff().max() <= max(*lengths, multiple), "no more keys than the kernel is told"
    assert row.starts.numel() == row.key_starts.numel() == len(lengths) + 5
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    heads = [x.clone() for x in random_heads(tokens + filler)]
    for x in heads:
        for begin in begins[1:]:
            x[:, :, begin : begin + shared] = x[:, :, :shared]  # a shared beginning has the same queries, keys, values
    mask = (row.starts, row.key_starts, row.keys)
    together = call(*(x[:, :, row.computed] for x in heads), mask, window)[:, row.source]
    assert together.shape == (1, tokens, 4, 16)
    for begin, length in zip(begins, lengths, strict=True):
        alone = attention(*(x[:, :, begin : begin + length] for x in heads), window)
        assert torch.allclose(together[:, begin : begin + length], alone, atol=1e-5)


@pytest.mark.parametrize(("dtype", "packs"), [(torch.bfloat16, True), (torch.float32, False)])
def test_float32_is_not_packed(dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `trainer.precision: 32-true` the varlen kernel would be given it, and takes 16 bits alone."""
    none = dict.fromkeys(("gemma2", "llama", "mistral", "qwen3"))  # whose kernels a CPU cannot import
    monkeypatch.setitem(sys.modules, "unsloth.models", SimpleNamespace(**none))
    marks = SimpleNamespace(mark_allow_overlength=lambda _: None)
    monkeypatch.setitem(sys.modules, "unsloth.utils.packing", marks)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("granite").to(dtype)
    enable_packing(model, 64)
    assert can_pack(model) is packs


def test_a_kernel_serves_the_models_loaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention call of all of them is the last one's; beyond `longest` the kernel would compute nothing."""
    from torch.nn.attention import varlen

    from medlit.model.packing import varlen_kernel

    given: list[tuple[Any, ...]] = []

    def attend(*inputs: Any, **options: Any) -> Tensor:  # noqa: ANN401
        given.append(inputs[5:])
        return inputs[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    earlier = varlen_kernel(4096, stock)
    assert route_stock_layers(tiny_model("granite"), earlier)
    for replaced in (route(stock, earlier), ALL_ATTENTION_FUNCTIONS["sdpa"], stock):
        varlen_kernel(512, replaced)(*[torch.zeros(1)] * 5, window=None)
    assert given == [(4096, 4096), (4096, 4096), (512, 512)]
    varlen_kernel(MULTIPLE - 1, stock)(*[torch.zeros(1)] * 5, window=None)
    assert given[-1] == (MULTIPLE, MULTIPLE), "a filler of more tokens than the kernel computes had a gradient of nan"


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6)])
def test_unpacked_batches_use_the_stock_attention(mask: Tensor | None) -> None:
    query, key, value = (torch.randn(3, heads, 6, 8) for heads in (4, 2, 2))
    ours = call(query, key, value, mask)
    assert torch.equal(ours, stock(config=None, context=None, Q=query, K=key, V=value))


def test_another_model_replaces_the_stock_attention_and_not_its_replacement() -> None:
    asked: list[Any] = []

    def own(*inputs: Any, **settings: Any) -> Tensor:  # noqa: ANN401
        asked.append((inputs, settings))
        return torch.zeros(1)

    context = SimpleNamespace(causal_mask=None, sliding_window=None)
    once = softcapped(own)
    for replaced in (once, softcapped(once)):
        replaced(*torch.zeros(3, 1), None, None, 1, 1)
        assert vars(replaced) == vars(once)
    once = route(own, by_part)
    for replaced in (once, route(once, by_part)):
        replaced(config=None, context=context, Q=None, K=None, V=None)
        assert vars(replaced) == vars(once)
    assert len(asked) == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "window"), [("SWA_mask", 7), ("GA_mask", None)])
@pytest.mark.parametrize("shared", [0, 1, 4, 12])
def test_a_packed_note_attends_as_alone_with_a_soft_cap(shared: int, name: str, window: int | None) -> None:
    lengths = [shared + rest for rest in (5, 1, 9, 30)]
    begins, tokens = [0, *accumulate(lengths)], sum(lengths)
    row = share_beginning(lengths, shared, len(lengths) + 4, torch.device("cpu"), BLOCK)
    positions = torch.cat([torch.arange(length) for length in lengths])[row.computed][None]
    heads = [x.clone() for x in random_heads(tokens)]
    for x in heads:
        for begin in begins[1:-1]:
            x[:, :, begin : begin + shared] = x[:, :, :shared]
    settings = SimpleNamespace(attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    inner = SimpleNamespace(config=SimpleNamespace(model_type="gemma2", sliding_window=7), **{PACKS: True})
    arguments = {"input_ids": row.computed[None], "position_ids": positions}
    with block_masks(inner, row.starts, arguments), torch.compiler.set_stance("force_eager"):
        layer, width = SimpleNamespace(config=settings), len(row.computed)
        out = softcapped(stock)(*(x[:, :, row.computed] for x in heads), getattr(inner, name), layer, 1, width)
    together = out.view(1, width, 4, 16)[:, row.source]
    assert not hasattr(inner, name), "the body makes the masks of other batches itself"
    for begin, end in pairwise(begins):
        alone = attention(*(x[:, :, begin:end] for x in heads), window, cap=0.5)
        assert torch.allclose(together[:, begin:end], alone, atol=1e-5)


@settings(deadline=None)  # the first mask takes longer
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.sampled_from([None, 0, 1, 52, 128, 200]),
    st.sampled_from([1, 64, 127, 128, 129, 300, 4096]),
)
def test_blocks_hold_all_keys_that_a_query_sees(rests: list[int], shared: int | None, window: int) -> None:
    """Padded rows have no `shared`. In some blocks the mask is asked, and not in those that are seen as a whole."""
    starts, arguments = None, {"input_ids": torch.zeros(len(rests), max(rests))}
    if shared is not None:
        lengths = [shared + rest for rest in rests]
        row = share_beginning(lengths, shared, len(lengths) + 4, torch.device("cpu"), BLOCK)
        positions = torch.cat([torch.arange(length) for length in lengths])[row.computed][None]
        starts, arguments = row.starts, {"input_ids": row.computed[None], "position_ids": positions}
    width = arguments["input_ids"].shape[1]
    inner = SimpleNamespace(config=SimpleNamespace(model_type="gemma2", sliding_window=window), **{PACKS: True})
    with block_masks(inner, starts, arguments):
        for mask in (inner.SWA_mask, inner.GA_mask):  # type: ignore[attr-defined]
            assert mask.seq_lengths == (width, width)
            seen = create_mask(mask.mask_mod, None, None, width, width, device="cpu")[0, 0]
            blocks = mask.kv_indices.shape[-1]
            padded = functional.pad(seen, (0, blocks * BLOCK - width) * 2).view(blocks, BLOCK, blocks, BLOCK)
            counts, (asked, whole) = padded.sum(dim=(1, 3)), torch.zeros(2, blocks, blocks, dtype=torch.bool)
            pairs = [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
            for chosen, (sizes, order) in zip((asked, whole), pairs, strict=True):
                chosen.scatter_(1, order[0, 0].long(), torch.arange(blocks) < sizes[0, 0][:, None])
            assert ((counts > 0) <= (asked | whole)).all()
            assert mask is inner.SWA_mask or ((counts > 0) == (asked | whole)).all()  # type: ignore[attr-defined]
            assert (whole <= (counts == BLOCK**2)).all()
            assert not (asked & whole).any()


def test_notes_and_windows_leave_blocks_out() -> None:
    """Two notes of four blocks, and layers whose window is two blocks long; the last row is its filler's."""
    row = share_beginning([4 * 128, 4 * 128 - 1], 0, 4, torch.device("cpu"), BLOCK)
    positions = torch.cat([torch.arange(4 * 128), torch.arange(4 * 128 - 1)])[row.computed][None]
    inner = SimpleNamespace(config=SimpleNamespace(model_type="gemma2", sliding_window=256), **{PACKS: True})
    with block_masks(inner, row.starts, {"input_ids": row.computed[None], "position_ids": positions}):
        for mask, asked, whole in (
            (inner.SWA_mask, [1, 1, 2, 2, 1, 1, 2, 3], [0, 1, 1, 1, 0, 1, 1, 0]),  # type: ignore[attr-defined]
            (inner.GA_mask, [1, 1, 1, 1, 1, 1, 1, 4], [0, 1, 2, 3, 0, 1, 2, 0]),  # type: ignore[attr-defined]
        ):
            assert mask.kv_num_blocks.flatten().tolist() == asked
            assert mask.full_kv_num_blocks.flatten().tolist() == whole


@pytest.mark.parametrize(("family", "multiple"), [("gemma2", BLOCK), ("llama", MULTIPLE)])
def test_flex_attention_is_given_whole_blocks(family: str, multiple: int) -> None:
    computed: list[int] = []

    class Body(nn.Module):
        config = SimpleNamespace(model_type=family)

        def forward(self, input_ids: Tensor, **_: object) -> tuple[Tensor]:
            computed.append(input_ids.numel())
            return (torch.zeros(1, input_ids.numel(), 4),)

    batch = Collator(lambda _: [7, 8, 2], 0).packed(notes_with(0), 1)
    states_read(Body(), batch, None)
    assert computed == [-(-sum(batch.lengths) // multiple) * multiple]


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """A tiny model in training mode whose layers, transformers' own, take packed notes."""

    def build(family: str) -> nn.Module:
        model = tiny_model(family).train()
        attention_class: Any = type(decoder_layers(model)[0].self_attn)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
        monkeypatch.setattr(attention_class, "forward", attention_class.forward)
        setattr(body(model), PACKS, route_stock_layers(model, by_part))
        assert packing_route(causal_lm(model).config) == "stock"
        assert can_pack(model)
        return model

    return build


def notes_with(beginning: int) -> list[TokenisedNote]:
    """Notes that begin alike; one has a single token more."""
    draw = torch.Generator().manual_seed(0)
    return [
        TokenisedNote(row=i, id=str(i), text_hash="", input_ids=ids, cut_tokens=0, specialty="a")
        for i, n in enumerate(LENGTHS)
        for ids in [[*range(100, 100 + beginning), *torch.randint(3, 90, (n,), generator=draw).tolist()]]
    ]


def plain_loss(model: nn.Module, notes: list[TokenisedNote], answer: list[int]) -> Tensor:
    """Of each note alone, by transformers."""
    total = torch.zeros(())
    for note in notes:
        logits = model(input_ids=torch.tensor([note["input_ids"] + answer])).logits[0, -len(answer) - 1 : -1]
        total = total + functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    return total


def assert_same_gradient(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    weights = list(model.parameters())
    for mine, other in zip(*(torch.autograd.grad(loss, weights) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


STOCK = ["gemma3_text", "granite", "phi3", "smollm3"]
# In the models with a window: none, shorter, as long, one longer, and so long that a note's end sees none of it.
BEGINNINGS = [0, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("family", STOCK)
def test_layers_of_transformers_compute_a_common_beginning_once(
    family: str, beginning: int, routed: Callable[[str], nn.Module]
) -> None:
    model, notes, answer = routed(family), notes_with(beginning), [7, 8, 2]
    computed: list[int] = []
    batch = Collator(lambda _: answer, 0).packed(notes, 1)
    assert batch.shared == beginning
    plain = plain_loss(model, notes, answer)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))  # type: ignore[operator]
    packed = loss_sum(model, batch)
    own = beginning + sum(LENGTHS) + len(answer) * len(LENGTHS)
    assert own <= computed[0] < own + MULTIPLE, "all of each note, where there is nothing to share"
    assert_same_gradient(model, packed, plain)
    assert_same_gradient(model, loss_sum(model, batch), loss_sum(model, batch.padded()))


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("family", STOCK)
def test_layers_of_transformers_read_packed_prompts_as_padded_ones(
    family: str, beginning: int, routed: Callable[[str], nn.Module]
) -> None:
    model, notes = routed(family).eval(), notes_with(beginning)
    prompts = left_padded([note["input_ids"] for note in notes])
    computed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))  # type: ignore[operator]
    packed = read_prompts(model, prompts)
    own = beginning + sum(LENGTHS)
    assert own <= computed[0] < own + MULTIPLE
    setattr(body(model), PACKS, False)
    padded = read_prompts(model, prompts)
    assert computed[1] == prompts.input_ids.numel()
    torch.testing.assert_close(packed.last, padded.last, rtol=1e-4, atol=1e-5)
    tokens, places, causal = torch.tensor([7, 8, 9]), torch.arange(3), torch.ones(3, 3, dtype=torch.bool).tril()
    ahead = [prefix.look_ahead(tokens, places, causal) for prefix in (packed, padded)]
    torch.testing.assert_close(*ahead, rtol=1e-4, atol=1e-5)
    longer = [
        prefix.extend(tokens.expand(len(notes), -1), causal[2].expand(len(notes), -1)) for prefix in (packed, padded)
    ]
    torch.testing.assert_close(longer[0].last, longer[1].last, rtol=1e-4, atol=1e-5)


@torch.library.custom_op("medlit_tests::varlen", mutates_args=())
def varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor) -> Tensor:
    """A kernel that compiles on a CPU, and computes nothing of use."""
    return query.clone()


varlen.register_fake(lambda query, *_: torch.empty_like(query))


def test_rows_of_other_lengths_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    model = tiny_model("granite").train()
    layer: Any = type(decoder_layers(model)[0])
    region = torch.compile(layer.forward, backend=backend)

    def forward(own: nn.Module, hidden: Tensor, **settings: Any) -> Any:  # noqa: ANN401
        """As Unsloth compiles a layer: dimensions of the row's length are of any length."""
        for tensor in (hidden, settings["position_ids"], *settings["position_embeddings"]):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return region(own, hidden, **settings)

    monkeypatch.setattr(layer, "forward", forward)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    setattr(body(model), PACKS, route_stock_layers(model, lambda *row, window, scale: varlen(*row)))
    for beginning in (20, 3, 150):
        with torch.no_grad():
            loss_sum(model, Collator(lambda _: [7, 8, 2], 0).packed(notes_with(beginning), 1))
    assert len(compiled) == 1


@pytest.mark.parametrize("family", STOCK)
def test_layers_that_are_recomputed_take_packed_notes(family: str, routed: Callable[[str], nn.Module]) -> None:
    model, notes, answer = routed(family), notes_with(WINDOW + 1), [7, 8, 2]
    calls: list[int] = []
    decoder_layers(model)[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    plain = plain_loss(model, notes, answer)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    before = len(calls)
    assert_same_gradient(model, loss_sum(model, Collator(lambda _: answer, 0).packed(notes, 1)), plain)
    assert len(calls) == before + 2


def test_the_attention_of_gemma3_that_unsloth_replaces_takes_packed_notes(
    routed: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_unsloth()
    attention_class = importlib.import_module("transformers.models.gemma3.modeling_gemma3").Gemma3Attention
    monkeypatch.setattr(attention_class, "forward", attention_class.forward)
    importlib.import_module("unsloth_zoo.temporary_patches.gemma").patch_Gemma3Attention_generic()
    assert "unsloth" in attention_class.forward.__module__, "as on a GPU"
    model, notes = routed("gemma3_text"), notes_with(WINDOW)
    packed = loss_sum(model, Collator(lambda _: [7, 8, 2], 0).packed(notes, 1))
    assert_same_gradient(model, packed, plain_loss(model, notes, [7, 8, 2]))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_another_attention_of_transformers_is_replaced_by_sdpa(
    implementation: str, routed: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tiny_model

    def with_another(family: str) -> nn.Module:
        model = make(family)
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        return model

    monkeypatch.setitem(globals(), "tiny_model", with_another)
    model = routed("gemma3_text")
    assert causal_lm(model).config._attn_implementation == "sdpa"
    batch = Collator(lambda _: [7], 0).packed(notes_with(WINDOW), 1)
    assert_same_gradient(model, loss_sum(model, batch), loss_sum(model, batch.padded()))


@pytest.mark.parametrize("tokens", [2, 8, 30])
def test_no_place_is_read_twice(tokens: int) -> None:
    """Where the prompts are trained on too, each note reads the common beginning, and the last layer is whole."""

    class Body(nn.Module):
        config = tiny_model("llama").config
        read: ClassVar[list[Tensor]] = []

        def forward(self, input_ids: Tensor, **_: object) -> tuple[Tensor]:
            self.read += [value for value in vars(self).values() if isinstance(value, Tensor)]
            return (torch.zeros(1, input_ids.shape[1], 8),)

    inner = Body()
    setattr(inner, PACKS, True)
    notes = [
        TokenisedNote(row=i, id=str(i), text_hash="", input_ids=[*range(5, 5 + tokens)], cut_tokens=0, specialty="a")
        for i in range(2)
    ]
    for mask_prompt in (True, False):
        states_read(inner, Collator(lambda _: [3, 4], 0, mask_prompt).packed(notes, 1), None)
    assert [len(read) for read in inner.read] == [4], "the answers' tokens, or all"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_that_does_not_know_packed_notes_fails(implementation: str) -> None:
    model = tiny_model("granite").train()
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    setattr(body(model), PACKS, True)
    with pytest.raises(RuntimeError, match=r"size|dtype"):
        loss_sum(model, Collator(lambda _: [7], 0).packed(notes_with(4), 1))


@pytest.mark.parametrize(
    "setting", [{"attention_dropout": 0.1}, {"use_bidirectional_attention": True}, {"head_dim": 20}, {"head_dim": 264}]
)
def test_attention_that_the_kernel_does_not_compute_is_not_packed(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gemma3_text", FAMILIES["gemma3_text"] | setting)
    model, before = tiny_model("gemma3_text"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert not route_stock_layers(model, by_part)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_what_packed_attention_would_leave_out_is_refused(routed: Callable[[str], nn.Module]) -> None:
    """Attention sinks, say: transformers hands them on by a name."""
    routed("granite")
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    row = share_beginning([6, 4], 2, 4, torch.device("cpu"), MULTIPLE)
    heads = [x[:, :, row.computed] for x in random_heads(12)]
    settings = {"medlit_row": (row.starts, row.key_starts, row.keys), "scaling": 0.3, "dropout": 0.0}
    whole, _ = attend(None, *heads, None, **settings, is_causal=None, s_aux=None)
    assert whole.shape == (1, len(row.computed), 4, 16)
    with pytest.raises(UserError, match=r"data.batching.packing: packed notes leave 's_aux' out of the base"):
        attend(None, *heads, None, **settings, s_aux=torch.zeros(4))


def test_autocast_reaches_the_kernel_of_packed_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA casts by itself, and rotary positions may leave queries and keys in float32."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    dtypes: list[torch.dtype] = []

    def kernel(*tensors: Tensor, window: int | None, scale: float | None = None) -> Tensor:
        dtypes.extend(x.dtype for x in tensors[:3])
        return by_part(*tensors, window=window, scale=scale)

    assert route_stock_layers(tiny_model("granite"), kernel)
    row = share_beginning([6, 4], 2, 4, torch.device("cpu"), MULTIPLE)
    given, heads = (row.starts, row.key_starts, row.keys), (x[:, :, row.computed] for x in random_heads(10))
    with torch.autocast("cpu", torch.bfloat16):
        ALL_ATTENTION_FUNCTIONS["sdpa"](None, *heads, None, medlit_row=given, scaling=0.3, dropout=0.0)
    assert dtypes == [torch.bfloat16] * 3


def test_other_batches_and_models_keep_their_attention(routed: Callable[[str], nn.Module]) -> None:
    others = [tiny_model("llama"), tiny_model("gpt2"), tiny_model("granite")]
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    before, stock_attention = [model(input_ids=ids).logits for model in others], ALL_ATTENTION_FUNCTIONS["sdpa"]
    routed("granite")
    routed("phi3")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is stock_attention, "replaced once, not once more for each model"
    for model, logits in zip(others, before, strict=True):
        assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_cpu_computes_the_common_beginning_of_padded_notes_once(family: str) -> None:
    model = tiny_model(family)
    model.config.sliding_window = None  # type: ignore[union-attr]
    prompts = [[*range(20, 70), *range(5 + own, 5 + 2 * own)] for own in (12, 3, 1)]
    computed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))  # type: ignore[operator]
    weight = next(p for p in model.parameters() if p.dim() == 1)
    together = loss_sum(model, right_padded(prompts, [7, 8, 2]))
    assert sum(computed) == 50 + 16 + 3 * 3
    cache = read_prompts(model, left_padded(prompts))
    assert sum(computed[1:]) == 50 + 3 * 12
    alone = [loss_sum(model, right_padded([prompt], [7, 8, 2])) for prompt in prompts]
    torch.testing.assert_close(together, torch.stack(alone).sum(), atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (together, torch.stack(alone).sum())]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)
    last = [read_prompts(model, left_padded([prompt])).last[0] for prompt in prompts]
    torch.testing.assert_close(cache.last, torch.stack(last), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "shared"),
    [("llama", 50), ("qwen3", 50), *((family, 0) for family in ("llama", "mistral", "qwen2", "gemma2"))],
)
def test_the_last_layer_computes_what_the_loss_reads(family: str, shared: int) -> None:
    """With one note several times: the token that its answer is predicted from is not part of the common beginning."""
    model = tiny_model(family)
    if shared:
        model.config.sliding_window = None  # type: ignore[union-attr]
    prompts = [[*range(20, 20 + shared), *range(5 + own, 5 + 2 * own)] for own in (30, 30, 30 if shared else 3)]
    notes = right_padded(prompts, [7, 8, 2])
    weights = [p for name, p in model.named_parameters() if "norm" in name or "proj" in name]
    whole = loss_sum(model.train(), notes)
    theirs = torch.autograd.grad(whole, weights)
    enable_last_layer(model)
    rows: list[int] = []
    last: Any = decoder_layers(model)[-1]
    last.mlp.down_proj.register_forward_pre_hook(lambda _, hidden: rows.append(hidden[0].flatten(0, -2).shape[0]))
    ours = loss_sum(model, notes)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=0)
    for mine, other in zip(torch.autograd.grad(ours, weights), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    model(input_ids=notes.input_ids)
    assert rows[0] == len(notes.places) < rows[1], "another pass is whole"
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    again = torch.autograd.grad(loss_sum(model, notes), weights)
    assert rows[2] == rows[3] > rows[0], "a layer that runs twice is whole"
    for mine, other in zip(again, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_cpu_computes_the_common_beginning_once_where_prompts_are_trained_on_too() -> None:
    """Most places are read then, those of the beginning by each note, and the last layer is whole."""
    model, computed, answer = tiny_model("llama").train(), list[int](), [7, 8, 2]
    enable_last_layer(model)
    rows = [[*range(20, 70), *range(5 + own, 5 + 2 * own), *answer] for own in (12, 3, 1)]
    every = right_padded(rows, [])
    places = [row * every.input_ids.shape[1] + i for row, ids in enumerate(rows) for i in range(len(ids) - 1)]
    targets = torch.tensor([token for ids in rows for token in ids[1:]])
    alone = torch.zeros(())
    for ids in map(torch.tensor, rows):
        alone = alone + functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))  # type: ignore[operator]
    together = loss_sum(model, every._replace(places=torch.tensor(places), targets=targets))
    assert computed == [50 + 16 + 3 * 3]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    weights = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, weights) for loss in (together, alone)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_long_notes_on_a_cpu_keep_their_own_rows() -> None:
    model, computed = tiny_model("llama"), list[int]()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))  # type: ignore[operator]
    prompts = [[*range(20, 70), *([5 + note] * 180)] for note in range(3)]
    loss_sum(model, right_padded(prompts, [7]))
    assert computed == [3 * 231], "a mask over one row of all notes would cost more than is saved"
