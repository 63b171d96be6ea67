"""Packed notes: end to end in one row, where each token attends to its own note's earlier tokens.

A layer with a sliding window keeps to it within the note. Three kinds of layers take packed notes:

- Layers of transformers' classes hand further arguments on to the attention call, and so the notes' starts.
- Layers that Unsloth wrote: it compiles one into a region, but not when it is given packed lengths, and without
  flash-attn it then runs one kernel a note. PyTorch's varlen kernel takes all notes at once and compiles; so the
  notes' starts travel to the attention call in place of a mask, which nothing else reads in training.
- Gemma 2's, whose scores have a soft cap: PyTorch's flex attention. Without flash-attn Unsloth would hold all scores.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from medlit.data.collate import Batch
from medlit.errors import UserError
from medlit.model.families import attention_kinds, body, causal_lm, decoder_layers, packing_route
from medlit.model.memory import Recomputation
from medlit.unsloth_first import stock_class

_STOCK = "_medlit_stock_attention"  # attribute of a call that medlit puts in its place: the one that it replaced
_LONGEST = "_medlit_longest"  # and most tokens of a note
# Argument of transformers' attention call: starts, starts of keys, keys; and those that packed notes support.
_ROW, _SUPPORTED = "medlit_row", {"dropout", "scaling", "sliding_window", "position_ids", "use_cache"}  # dropout: 0
PACKS = "_medlit_packs"  # attribute of a body: whether its attention takes packed notes
_READ = "_medlit_read"  # attribute of a body: which tokens are read of its output, while it runs
_ROPE_ROWS = 2**16  # most tokens of a packed row whose positions are tabulated in advance, in 32 MiB
# On a CPU: fewest tokens to save by computing a common beginning once, and most tokens of a masked row.
_LEAST_SAVED, _MASKED_ROW = 64, 512
# Computed tokens come in multiples of this: with odd counts a GPU's matrix products fall back to slow kernels.
MULTIPLE = 16
BLOCK = 128  # and of this for flex attention, its blocks' tokens; other counts would be compiled once more
Kernel = Callable[..., Tensor]


def can_pack(model: nn.Module) -> bool:
    """Whether a model's attention takes packed notes; `enable_packing` decides."""
    return getattr(body(model), PACKS, False)


def enable_packing(model: nn.Module, max_length: int) -> None:
    """Let a model's attention take packed notes of up to `max_length` tokens where it can, on a GPU from Ampere on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from unsloth.models import gemma2, llama, mistral, qwen3
    from unsloth.utils.packing import mark_allow_overlength

    inner: Any = causal_lm(model)
    kind = packing_route(inner.config)
    capability = torch.cuda.get_device_capability(inner.device)
    packs = kind is not None and capability >= (8, 0) and inner.dtype != torch.float32  # the kernels take 16 bits
    packs = packs and not (kind == "softcapped" and gemma2.HAS_FLASH_ATTENTION_SOFTCAPPING)  # which ignores masks
    if packs and kind == "softcapped":
        for name in ("slow_attention_softcapping", "slow_inference_attention_softcapping"):
            setattr(gemma2, name, softcapped(getattr(gemma2, name)))
    elif packs and kind == "fused":
        for module in (llama, mistral, qwen3):
            module.run_attention = route(module.run_attention, varlen_kernel(max_length, module.run_attention))
        rotary: Any = body(model).rotary_emb
        # A longer row than the table of positions would be compiled again in every layer.
        rotary.extend_rope_embedding(inner.get_input_embeddings().weight, _ROPE_ROWS)
        # Long factors are for long notes, which `load_model` refuses, and not for the rows of many.
        if (short := getattr(rotary, "original_max_position_embeddings", None)) is not None:
            rotary.original_max_position_embeddings = max(short, _ROPE_ROWS)
    elif packs:
        packs = route_stock_layers(model, varlen_kernel(max_length, ALL_ATTENTION_FUNCTIONS["sdpa"]))
    for layer in decoder_layers(model) if kind == "softcapped" else ():
        # Compiled as one region such a layer fails on PyTorch 2.11: github.com/pytorch/pytorch/issues/181735
        layer._unsloth_block_mode = 0  # type: ignore[assignment]
    mark_allow_overlength(model)
    setattr(body(model), PACKS, packs)


def enable_last_layer(model: nn.Module) -> None:
    """Let the last layer project attention's output and run its MLP only where `states_read` reads it.

    Elsewhere both give zeros, and the loss and its gradient stay as they are. Not in layers of transformers' classes,
    which would not be compiled any more: that made a Phi-3 slower, and a Granite little faster.
    """
    inner, layer = body(model), cast("Any", decoder_layers(model)[-1])
    if packing_route(causal_lm(model).config) not in ("fused", "softcapped"):
        return

    def at_read(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            read: Tensor | None = getattr(inner, _READ, None)
            if read is None or layer.gradient_checkpointing:  # then it runs again later
                return forward(hidden)
            out = forward(hidden.flatten(0, 1)[read][None])[0]
            whole = out.new_zeros(*hidden.shape[:2], out.shape[1])
            whole.flatten(0, 1)[read] = out
            return whole

        return run

    layer.self_attn.apply_o = lambda attention, hidden: attention.o_proj(hidden)  # Unsloth's own goes past it
    layer._unsloth_block_mode = 0  # compiled, each number of read tokens might need another graph
    for part in (layer.self_attn.o_proj, layer.mlp):
        part.forward = at_read(part.forward)


def states_read(inner: Any, batch: Batch, recomputation: Recomputation | None) -> Tensor:  # noqa: ANN401 - see causal_lm
    """A body's output, computed without a mask, where the loss of a padded or packed batch reads it, (S, D).

    No place is read twice, or the last layer's gradient would count it twice; where most are read it computes them all.
    """
    ids, read = batch.input_ids, batch.places
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    starts = None
    if not batch.parts and ids.device.type == "cpu":
        lengths = torch.tensor(batch.lengths)
        reads_most = 2 * len(read) > sum(batch.lengths)
        shared = common_beginning(inner, ids, lengths if reads_most else read % ids.shape[1] + 1)
        # Each token attends to the whole row, other notes masked, so with long notes that costs more than it saves.
        if shared and sum(batch.lengths) - (len(ids) - 1) * shared <= _MASKED_ROW:
            arguments, source = _masked_row(inner, ids, lengths, shared)
            read = source.flatten()[read]
    elif batch.parts:
        # Flex attention's backward pass gives a block of keys to one program, however many tokens attend to it.
        shared = 0 if packing_route(inner.config) == "softcapped" else batch.shared
        row = share_beginning(batch.lengths, shared, batch.parts, ids.device, row_multiple(inner))
        arguments, read = shared_row(inner, ids, batch.positions, row), row.source[read]  # type: ignore[arg-type]
        starts = row.starts
    if recomputation is not None:
        recomputation.prepare(arguments["input_ids"].numel())
    setattr(inner, _READ, read if 2 * len(read) <= sum(batch.lengths) else None)
    try:
        with block_masks(inner, starts, arguments):
            hidden: Tensor = inner(**arguments)[0]
    finally:
        setattr(inner, _READ, None)
    return hidden.flatten(0, 1).index_select(0, read)


class SharedRow(NamedTuple):
    """A packed row whose common beginning is computed once, in front of what follows it in each note.

    notes      [1 2 3 4] [1 2 5]                      shared: 2
    computed   1 2 | 3 4 | 5 | a filler of 1          starts 0 2 4 5 6
    keys       1 2 | 1 2 3 4 | 1 2 5 | 1              key_starts 0 2 6 9 10
    """

    computed: Tensor  # places in the packed row of the T tokens that are computed, (T,) int64
    source: Tensor  # for each token of the notes its place among these, int64
    starts: Tensor  # of the beginning and of what follows it in each note, int32
    keys: Tensor  # places among the T tokens of what these attend to, int64
    key_starts: Tensor  # where these begin, int32


def row_multiple(inner: nn.Module) -> int:
    """Return the number that the computed tokens of a body's packed row are a multiple of."""
    return BLOCK if packing_route(inner.config) == "softcapped" else MULTIPLE


def share_beginning(of_notes: list[int], shared: int, parts: int, device: torch.device, multiple: int) -> SharedRow:
    """Compute the beginning that all packed notes share once; attention is as if each note had its own.

    `of_notes` are their tokens. `parts`, at least the notes + 2, is the same for every batch, to compile nothing again.
    """
    lengths, ends = np.array(of_notes), np.cumsum(of_notes)
    place = np.arange(ends[-1])
    note = np.searchsorted(ends, place, side="right")  # of each token
    offset = place - (ends - lengths)[note]
    common = offset < shared
    computed = np.flatnonzero(~common | (note == 0))
    source = np.where(common, offset, np.searchsorted(computed, place))
    filler = -len(computed) % multiple
    computed = np.append(computed, np.zeros(filler, dtype=np.int64))
    sizes = np.zeros(parts, dtype=np.int64)
    sizes[: len(ends) + 2] = [shared, *(lengths - shared), filler]
    key_sizes, rests = sizes.copy(), slice(1, len(ends) + 1)  # of the parts, those of the notes; then comes the filler
    key_sizes[rests] += shared * (sizes[rests] > 0)
    starts, key_starts = (np.append(0, np.cumsum(x)) for x in (sizes, key_sizes))
    own = [np.arange(begin, end) for begin, end in pairwise(starts)]
    of_rests = (part for each in own[rests] if len(each) for part in (own[0], each))
    keys = np.concatenate([own[0], *of_rests, *own[rests.stop :]])
    on_host = map(torch.from_numpy, (computed, source, starts.astype(np.int32), keys, key_starts.astype(np.int32)))
    row = SharedRow(*(x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x for x in on_host))
    torch._dynamo.maybe_mark_dynamic(row.keys, 0)  # or a row with other keys would be compiled again
    return row


def common_beginning(inner: Any, ids: Tensor, longer: Tensor) -> int:  # noqa: ANN401 - see causal_lm
    """Number of tokens that all rows, (B, T), share, under any of `longer`, if a CPU saves time with them; else 0."""
    is_fused = packing_route(inner.config) == "fused" and attention_kinds(inner) == {"full_attention"}
    if ids.device.type != "cpu" or not is_fused:
        return 0
    shared = min(int((ids == ids[0]).all(dim=0).cumprod(dim=0).sum()), int(longer.min()) - 1)
    # An additional pass or mask costs more than a few tokens.
    return shared if (len(ids) - 1) * shared >= _LEAST_SAVED else 0


def _masked_row(inner: Any, ids: Tensor, lengths: Tensor, shared: int) -> tuple[dict[str, Any], Tensor]:  # noqa: ANN401
    """A body's arguments for right-padded rows, end to end after their common beginning; their places there, (B, T)."""
    columns, rows = torch.arange(ids.shape[1]).expand_as(ids), torch.arange(len(ids))[:, None].expand_as(ids)
    own = (columns >= shared) & (columns < lengths[:, None])
    note = torch.cat([torch.full((shared,), -1), rows[own]])
    hidden_from = ~((note[:, None] == note) | (note == -1)).tril()
    dtype = inner.get_input_embeddings().weight.dtype
    mask = torch.zeros(hidden_from.shape, dtype=dtype).masked_fill_(hidden_from, torch.finfo(dtype).min)
    arguments = {
        "input_ids": torch.cat([ids[0, :shared], ids[own]])[None],
        "position_ids": torch.cat([columns[0, :shared], columns[own]])[None],
        "attention_mask": mask[None, None],
        "use_cache": False,
    }
    return arguments, columns.where(columns < shared, shared - 1 + own.flatten().cumsum(dim=0).view_as(ids))


def shared_row(
    inner: nn.Module, ids: Tensor, positions: Tensor, row: SharedRow, *, cache: bool = False
) -> dict[str, Any]:
    """A body's arguments for the computed tokens of a packed row, (1, T); with a cache, in inference mode."""
    place, tokens = (row.starts, row.key_starts, row.keys), row.computed
    arguments = {"input_ids": ids[:, tokens], "position_ids": positions[:, tokens], "use_cache": cache}
    if packing_route(inner.config) == "stock":  # a mask of four dimensions is taken as it is
        own = {"past_key_values": DynamicCache()} if cache else {}  # as in `read_prompts`
        return arguments | own | {_ROW: place, "attention_mask": ids.new_zeros(1, 1, 0, 0)}
    # In training the mask of ones is dropped, but without one Unsloth would derive the packing from the positions and
    # leave its compiled layers for it.
    return arguments | {"causal_mask": place, "attention_mask": None if cache else torch.ones_like(tokens)[None]}


def varlen_kernel(longest: int, replaced: object) -> Kernel:
    """PyTorch's causal varlen attention: (T, heads, D) queries, (C, heads, D) keys and values, their starts.

    The last query of a part attends to all of its keys. `longest`, the most tokens of a note, is the same for every
    batch, so that nothing is compiled again. The kernel computes nothing beyond it, so it is never below that of the
    attention call that is `replaced`, for the models loaded before too.
    """
    from torch.nn.attention.varlen import varlen_attn

    attend, known = cast("Kernel", varlen_attn), inspect.signature(varlen_attn).parameters
    # PyTorch 2.11 groups queries by itself; later versions need the flag.
    extra: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    longest = max(longest, MULTIPLE, getattr(replaced, _LONGEST, 0))

    def kernel(*tensors: Tensor, window: int | None, scale: float | None = None) -> Tensor:
        earlier = -1 if window is None else window - 1  # tokens before its own that a token attends to
        return attend(*tensors, longest, longest, scale=scale, window_size=(earlier, 0), **extra)

    setattr(kernel, _LONGEST, longest)
    return kernel


def route(stock: Callable[..., Tensor], kernel: Kernel) -> Callable[..., Tensor]:
    """Unsloth's attention call, which sends packed notes, recognised by a tuple for a mask, to a varlen kernel."""
    stock = getattr(stock, _STOCK, stock)

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
        if isinstance(context.causal_mask, tuple):
            return _attend(kernel, (Q, K, V), context.causal_mask, window=context.sliding_window)
        return stock(config=config, context=context, Q=Q, K=K, V=V)

    vars(run_attention).update({_STOCK: stock} | vars(kernel))  # its `_LONGEST`
    return run_attention


def route_stock_layers(model: nn.Module, kernel: Kernel) -> bool:
    """Let layers of transformers' classes send packed notes to a varlen kernel; whether it computes their attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers: list[Any] = decoder_layers(model)
    cast("Any", causal_lm(model)).set_attn_implementation("sdpa")  # whose entry is replaced below
    if (part := layers[0].self_attn).attention_dropout or not part.is_causal or part.head_dim not in range(8, 257, 8):
        return False
    for layer in layers:  # Unsloth's attention of Gemma 3 goes past that entry
        own = sys.modules[stock_class(type(layer)).__module__]
        type(layer.self_attn).forward = getattr(own, type(layer.self_attn).__name__).forward
    stock = getattr(ALL_ATTENTION_FUNCTIONS["sdpa"], _STOCK, ALL_ATTENTION_FUNCTIONS["sdpa"])

    @functools.wraps(stock)
    def attention(*inputs: Any, **settings: Any) -> Any:  # noqa: ANN401 - as transformers calls it
        if (row := settings.pop(_ROW, None)) is None:
            return stock(*inputs, **settings)
        if unsupported := {name for name, value in settings.items() if value is not None} - _SUPPORTED:
            fault = f"packed notes leave {min(unsupported)!r} out of the base model's attention"
            raise UserError(f"data.batching.packing: {fault}; set it to false.")
        _, *heads, _ = inputs
        if torch.is_autocast_enabled(device := heads[0].device.type):  # SDPA casts by itself
            heads = [x.to(torch.get_autocast_dtype(device)) for x in heads]
        return _attend(kernel, heads, row, window=settings.get("sliding_window"), scale=settings["scaling"]), None

    vars(attention).update({_STOCK: stock} | vars(kernel))
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    return True


def _attend(kernel: Kernel, heads: Iterable[Tensor], row: Iterable[Tensor], **options: float | None) -> Tensor:
    """Attention of a packed row, (1, heads, T, D) to (1, T, heads, D)."""
    starts, key_starts, keys = row
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in heads)
    return kernel(query.contiguous(), key[keys], value[keys], starts, key_starts, **options)[None]


def softcapped(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gemma 2's attention call, which runs flex attention where its mask is a `BlockMask`."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attend, stock = torch.compile(flex_attention), getattr(stock, _STOCK, stock)

    @functools.cache
    def score_mod(cap: float) -> Callable[..., Tensor]:
        return lambda score, batch, head, query, key: cap * torch.tanh(score / cap)

    def attention(Q: Tensor, K: Tensor, V: Tensor, mask: Any, layer: Any, rows: int, width: int) -> Tensor:  # noqa: ANN401
        if not isinstance(mask, BlockMask):
            return stock(Q, K, V, mask, layer, rows, width)
        settings = layer.config
        cap, scale = score_mod(settings.attn_logit_softcapping), settings.query_pre_attn_scalar**-0.5
        out: Any = attend(Q, K, V, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True)
        return cast("Tensor", out.transpose(1, 2).reshape(rows, width, -1))

    vars(attention)[_STOCK] = stock
    return attention


@contextlib.contextmanager
def block_masks(inner: Any, starts: Tensor | None, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401 - see causal_lm
    """Masks where Gemma 2's body looks for its own: with a sliding window and without; `starts` are a `SharedRow`'s."""
    if packing_route(inner.config) != "softcapped" or not getattr(inner, PACKS, False):
        yield
        return
    from torch.nn.attention.flex_attention import BlockMask

    (_, width), device = arguments["input_ids"].shape, arguments["input_ids"].device
    position = torch.arange(width, device=device)
    part = torch.zeros_like(position)  # of each token; that of the common beginning is 0
    if starts is not None:
        part, position = torch.bucketize(position, starts[1:], right=True), arguments["position_ids"][0]

    def within(window: Tensor) -> Callable[..., Tensor]:  # a tensor, or another kernel would be compiled for each
        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (part[query] == part[key]) | (part[key] == 0)
            return (query >= key) & is_own & (position[query] - position[key] < window)

        return sees

    # From the blocks' first and last parts: `create_block_mask` would hold a mask of all pairs of tokens.
    blocks = functional.pad(part, (0, -width % BLOCK), value=-1).view(-1, BLOCK)
    first, last, begin = blocks.amin(dim=1), blocks.amax(dim=1), BLOCK * torch.arange(len(blocks), device=device)
    distance = begin[:, None] - begin
    meets = (distance >= 0) & ((first[:, None] <= last) | (first == 0))
    is_one_part = (distance > 0) & (first[:, None] == last) & (last[:, None] == first)
    for name, window in (("SWA_mask", inner.config.sliding_window), ("GA_mask", width)):
        is_near = (distance - BLOCK < window) | ((first == 0) & (last[:, None] > 0))  # the beginning is, to every note
        whole = is_one_part & (distance + BLOCK <= window)
        chosen = torch.stack([meets & is_near & ~whole, whole]).int()[:, None, None]  # two, (1, 1, blocks, blocks)
        counts, order = chosen.sum(dim=-1).int(), chosen.argsort(dim=-1, descending=True, stable=True).int()
        of_blocks, sees = (counts[0], order[0], counts[1], order[1]), within(torch.full((), window, device=device))
        setattr(inner, name, BlockMask.from_kv_blocks(*of_blocks, BLOCK, sees, (width, width)))
    try:
        yield
    finally:
        del inner.SWA_mask, inner.GA_mask
