"""Check, before a base model is used, that medlit computes the model's own numbers.

Families differ in scales, caps, windows and states, and a wrong number would look like any other. So the loss and the
log-likelihoods of made-up prompts and answers, short ones and one of the greatest length, some that begin alike and
some that repeat what a window just shows and just hides, are compared with plain forward passes over the loaded
weights. These run through stock classes of transformers, since Unsloth replaces the loaded ones on a GPU and makes
mistakes itself. An adapter, which changes nothing at first, gets random weights meanwhile, and the loss is computed in
training too. Where the shared prompt of `kv_cache` does not reproduce the numbers, it is computed again for each label;
where that does not either, the model is refused.

How much rounding changes the numbers depends on format, depth and family, so it is measured: each plain pass is
repeated with every embedding changed by a unit in its last place. In a mixture of experts that sends some tokens to
other experts, which changes few numbers by much, so the greatest change counts there too.
"""

import contextlib
import copy
import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medlit.atomic_io import write_json
from medlit.data.cache import cache_key
from medlit.data.collate import Batch, Collator, TokenisedNote, unnamed_rows
from medlit.data.prompt import Prompt
from medlit.errors import WrongNumbersError, best_effort, tell
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.likelihood import LabelScorer
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import REPLAY, block_swap, causal_lm, is_mixture, shares_prompts, sliding_window, text_config
from medlit.model.head import head_logits
from medlit.model.language_model import at_default_precision, inference_mode, loss_sum, train_mode
from medlit.model.packing import can_pack
from medlit.model.settings import LanguageModel
from medlit.paths import __version__, cache_dir
from medlit.unsloth_first import stock_class

_SHORT, _ALIKE = 5, 32  # tokens of a prompt, and of a common beginning that a CPU computes once for four prompts
_ANSWER = 16  # tokens of the answer whose loss is compared
_REPEATED = 16  # tokens that a prompt's end and its middle have in common
_TOP, _DRAWN = 8, 256  # tokens whose log-likelihood is compared: each prompt's likeliest, and random ones
_MARGIN = 5.0  # a difference above this many times the measured rounding is a fault; correct decoders reached 3.4
_GREATEST = 3.0  # in a mixture, the greatest change at one place divided by this, if it is more than the mean
_LEAST, _MOST = 1e-4, 1.0  # bounds of the measured rounding in nats
_ROWS = 256  # of logits that are held in float32 at once
_ON_GPU = ["triton", "torchao", "flash-linear-attention", "causal-conv1d"]
_USED = ["torch", "transformers", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", *_ON_GPU]
_log = logging.getLogger(__name__)


def check_numbers(model: nn.Module, language_model: LanguageModel) -> None:
    """Choose how prompts are continued; a WrongNumbersError where the numbers differ by more than rounding."""
    inner = causal_lm(model)
    record = cache_dir() / "checked" / f"{_key(inner, language_model)}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        inner.__dict__[REPLAY] = bool(json.loads(record.read_text(encoding="utf-8"))["replay"])
        return
    if inner.device.type == "cpu":  # a GPU takes about a second
        what = f"checking that {language_model.base_model} gives the numbers of plain transformers"
        tell(f"{what}; up to minutes on a CPU, repeated for other settings or versions only")
    inference_mode(model)
    for replay in [False, True] if shares_prompts(model) else [True]:
        inner.__dict__[REPLAY] = replay
        fault, is_stock = _fault(model, language_model)
        if not fault:
            break
    else:
        raise WrongNumbersError(
            f"model.language_model.base_model: medlit does not reproduce the numbers of {language_model.base_model}"
            f" ({type(inner).__name__}): {fault}; choose another base model."
        )
    if inner.__dict__[REPLAY]:
        _log.info("%s: prompts are computed again for each label, which is slower", type(inner).__name__)
    if is_stock:
        with best_effort("the record of its check of numbers"):  # the cache may be read-only
            record.parent.mkdir(mode=0o700, exist_ok=True)
            write_json(record, {"replay": inner.__dict__[REPLAY]})


def _key(inner: Any, language_model: LanguageModel) -> str:  # noqa: ANN401 - see causal_lm
    versions = ["loss in training", __version__]  # the first names what is compared: change it with that
    for package in _USED:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    device = torch.cuda.get_device_name(inner.device) if inner.device.type == "cuda" else "cpu"
    # What medlit computes follows from code and configuration; other weights can still show another fault.
    folder = Path(language_model.base_model).expanduser()
    files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin") and f.is_file())
    weights = [inner.config._commit_hash, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    config = json.dumps(inner.config.to_dict(), default=str)
    layers = _adapted_layers(inner).items()
    adapter = [(n, type(p), p.r, p.scaling, str(p.lora_dropout), [*p.lora_variant]) for n, p in layers]
    # Without 'unsloth' no layer is recomputed here, and memory and batches play no part.
    settings = replace(language_model, memory_budget_gib=None, batch_tokens=0, prompt_format="alpaca")
    if settings.gradient_checkpointing == "auto":
        settings = replace(settings, gradient_checkpointing="none")
    return cache_key(versions, device, str(inner.dtype), settings, weights, config, adapter)


class Compared(NamedTuple):
    """One of medlit's numbers beside the model's own."""

    what: str
    apart: float  # nats a token, the root mean square where several numbers are compared
    allowed: float


class _Plain(NamedTuple):
    """What plain forward passes find about batches of B prompts and an answer, on the host in float64, in nats."""

    batches: list[list[TokenisedNote]]
    answer: list[int]
    following: tuple[Tensor, ...]  # of each batch: log-probabilities at the answer's first three tokens, (B, 3, V)
    nats: tuple[Tensor, ...]  # of each batch: the answer's log-likelihood, (B,)
    allowed: float  # difference of a log-probability
    allowed_of_scale: float
    is_stock: bool  # through stock classes of transformers


def _fault(model: nn.Module, language_model: LanguageModel) -> tuple[str, bool]:
    """What differs and by how much, empty if nothing does; and whether stock classes of transformers say so."""
    try:
        compared, is_stock = compare(model, language_model)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _log.debug("%s", error, exc_info=True)
        return f"the check ended with {type(error).__name__}", False
    wrong = next((each for each in compared if not each.apart <= each.allowed), None)
    return f"{wrong.what} differs by {wrong.apart:.2g} nats" if wrong else "", is_stock


def compare(model: nn.Module, language_model: LanguageModel) -> tuple[list[Compared], bool]:
    """Compare a model's numbers with plain passes, through stock classes or not; leaves it in inference mode."""
    inner = causal_lm(model)
    # Nothing is compiled for a few passes, which took a minute. Lightning builds models within their device's context;
    # what is made here is moved there where it is needed.
    eager, host = torch.compiler.set_stance("force_eager"), torch.device("cpu")
    random_state = torch.random.fork_rng([] if inner.device.type == "cpu" else [inner.device])
    with eager, host, random_state, torch.no_grad(), at_default_precision(model), _random_adapter(model):
        plain = _plain(inner, *_made_up(model, language_model.max_length))
        return [*_answers(model, plain), *_losses(model, plain, language_model)], plain.is_stock


def _made_up(model: nn.Module, longest: int) -> tuple[list[list[TokenisedNote]], list[int]]:
    """Batches of prompts, the second prompt being the longest that leaves room for the answer; and the answer."""
    text = text_config(model)
    length = longest - max(3, min(_ANSWER, longest // 4))
    # Ids from the middle of the vocabulary, as its ends hold control tokens.
    ids = random.Random(0).choices(range(text.vocab_size // 8, text.vocab_size // 2), k=longest)
    first: Any = getattr(text, "bos_token_id", None)  # without it some trained models predict nothing
    if first in range(text.vocab_size):
        ids[0] = first
    ids, answer = ids[:length], ids[length:]
    # The answer stands earlier too, after the prompt's last tokens, where a window just hides or just shows it.
    window = sliding_window(model) or longest
    reaches = window + _REPEATED + 2 <= length
    batches = [[ids[:_SHORT], _repeat(ids, answer, window + 1 if reaches else length // 2)]]
    batches += [[_repeat(ids[: window + _REPEATED + 1], answer, window)]] if reaches else []
    if causal_lm(model).device.type == "cpu":
        # A CPU computes prompts that begin alike by separate code; a GPU computes the beginning of any prompts once.
        alike = min(_ALIKE, longest // 2)
        batches.append([ids[:alike] + ids[alike + i : alike + 3 * i] for i in range(1, 5)])
    return [unnamed_rows([Prompt(each, 0) for each in batch]) for batch in batches], answer


def _repeat(prompt: list[int], answer: list[int], apart: int) -> list[int]:
    """A prompt whose last tokens stand `apart` tokens earlier too, where as much of the answer as fits follows them."""
    size, end = max(1, min(_REPEATED, apart - 3)), len(prompt) - apart
    known = answer[: apart - size]
    return [*prompt[: end - size], *prompt[-size:], *known, *prompt[end + len(known) :]]


def _answers(model: nn.Module, plain: _Plain) -> Iterator[Compared]:
    """How far log-likelihoods of tokens and labels are from the plain ones, in nats a token."""
    a, b, c, *_ = plain.answer
    firsts = torch.cat(plain.following)[:, 0]
    middle = range(firsts.shape[1] // 8, firsts.shape[1] // 2)
    *drawn, d = random.Random(1).sample(middle, min(_DRAWN, len(middle) // 2) + 1)
    tokens = sorted({*drawn, *firsts.topk(_TOP).indices.flatten().tolist()})
    labels = [[a, b, c], [a, d], [b]]
    scorer = LabelScorer(model, TokenTrie.of([*labels, *([token] for token in tokens)]))
    collator, of_tokens = Collator(lambda _: plain.answer, pad_id=0), list[Tensor]()
    for rows, following in zip(plain.batches, plain.following, strict=True):
        prefix = read_prompts(model, move_data_to_device(collator.prompts(rows), causal_lm(model).device))
        scores = scorer.paths(scorer.edges(prefix)).double().cpu()
        first, second, third = following.unbind(dim=1)
        of_tokens.append(scores[:, len(labels) :] - first[:, tokens])
        whole = first[:, a] + second[:, b] + third[:, c]
        reference = torch.stack([whole, first[:, a] + second[:, d], first[:, b]], dim=1)
        of_labels = (scores[:, : len(labels)] - reference) / torch.tensor([*map(len, labels)]).sqrt()
        generated = -whole
        for token in labels[0]:
            generated += head_logits(model, prefix.last).log_softmax(dim=1)[:, token].double().cpu()
            chosen = torch.full_like(prefix.lengths, token)[:, None]
            prefix = prefix.extend(chosen, chosen == token)
        for i, row in enumerate(rows):
            place = f"log-likelihood after {len(row['input_ids'])} tokens"
            yield Compared(f"a token's {place}", float(_rms(of_tokens[-1][i])), plain.allowed)
            yield Compared(f"a label's {place}", float(_rms(of_labels[i])), plain.allowed)
            yield Compared(f"an answer's {place}", abs(float(generated[i])) / len(labels[0]) ** 0.5, plain.allowed)
    # Where all logits are scaled, many small differences point in one direction.
    direction = firsts[:, tokens] - firsts[:, tokens].mean(dim=1, keepdim=True)
    along = (torch.cat(of_tokens) * direction).sum() / direction.norm()
    yield Compared("the scale of logits", abs(float(along)), plain.allowed_of_scale)


def _losses(model: nn.Module, plain: _Plain, language_model: LanguageModel) -> Iterator[Compared]:
    """How far the answer's loss is from the plain one, in nats a token; in training too where an adapter is trained."""
    collator = Collator(lambda _: plain.answer, pad_id=0)

    def differences(what: str, collate: Callable[[list[TokenisedNote], int], Batch]) -> Iterator[Compared]:
        for rows, nats in zip(plain.batches, plain.nats, strict=True):
            batch = move_data_to_device(collate(rows, 1), causal_lm(model).device)
            apart = (loss_sum(model, batch).cpu() + nats.sum()) / len(batch.targets) ** 0.5
            yield Compared(what, abs(float(apart)), plain.allowed)

    yield from differences("a batch's loss", collator.train)
    # FP8 rounds inputs in training alone, and layers in host memory are trained one by one.
    if _adapted_layers(model) and not language_model.load_in_fp8 and block_swap(model) is None:
        with _training(model, language_model):
            yield from differences("a batch's loss in training", collator.train)
            if can_pack(model):
                yield from differences("a packed batch's loss", collator.packed)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer  # it imports bitsandbytes, which `--help` need not wait for

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


@contextlib.contextmanager
def _random_adapter(model: nn.Module) -> Iterator[None]:
    """Weights with which a new adapter, otherwise the identity, adds about a twentieth to the output of its layers."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as restore:
        for part, name in [(each, name) for each in _adapted_layers(model).values() for name in each.lora_B]:
            weight = part.lora_B[name].weight
            restore.callback(weight.copy_, weight.clone())
            weight.copy_(0.1 / (part.scaling[name] * part.r[name] ** 0.5) * torch.randn_like(weight))
        yield


@contextlib.contextmanager
def _training(model: nn.Module, language_model: LanguageModel) -> Iterator[None]:
    """Training mode without dropout and jitter, whose rates modules or the configuration hold."""
    with contextlib.ExitStack() as restore:
        restore.callback(inference_mode, model)
        for values in [each.__dict__ for each in (*model.modules(), text_config(model))]:
            for name, value in values.items():
                if isinstance(value, float) and (name == "p" or re.search("drop|jitter", name)):
                    restore.callback(values.__setitem__, name, value)
                    values[name] = 0.0
        train_mode(model, language_model)
        yield


def _plain(inner: Any, batches: list[list[TokenisedNote]], answer: list[int]) -> _Plain:  # noqa: ANN401
    try:
        found = _forwards(_stock_model(inner), batches, answer)
        if all(each.isfinite().all() for each in found.following):
            return found._replace(is_stock=True)
    except Exception as error:
        _log.debug("%s", error, exc_info=True)
    # Stock classes may not fit the weights, the memory or the number format; the loaded ones at least run.
    _log.info("%s is checked without stock classes of transformers", type(inner).__name__)
    return _forwards(inner, batches, answer)


def _forwards(plain: Any, batches: list[list[TokenisedNote]], answer: list[int]) -> _Plain:  # noqa: ANN401
    following, nats, changes, along = [], [], [], []
    for row in chain(*batches):
        prompt = row["input_ids"]
        ids = torch.tensor(prompt + answer, device=plain.device)
        logits = plain(input_ids=ids[None], use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].float().log_softmax(dim=-1)
        following.append(rows[:3].double().cpu())
        nats.append(rows.gather(1, ids[len(prompt) :, None]).double().sum().cpu())
        before = _log_probabilities(logits)
        del logits, rows  # two of a long prompt and a large vocabulary may be more than is free
        with _change_embeddings(plain):
            change = _log_probabilities(plain(input_ids=ids[None], use_cache=False).logits[0]) - before
        change, before = change.nan_to_num(), before.nan_to_num()  # a model may mask some tokens
        changes.append(_rms(change))
        direction = before - before.mean(dim=1, keepdim=True)
        along.append((change * direction).sum(dim=1) / direction.norm(dim=1))
    first, whole = (torch.split(torch.stack(each), [*map(len, batches)]) for each in (following, nats))
    rounding = [float(_rms(torch.cat(each))) for each in (changes, along)]
    if is_mixture(plain):
        rounding[0] = max(rounding[0], float(torch.cat(changes).max()) / _GREATEST)
    allowed, of_scale = (_MARGIN * min(max(each, _LEAST), _MOST) for each in rounding)
    return _Plain(batches, answer, first, whole, allowed, of_scale, is_stock=False)


def _rms(values: Tensor) -> Tensor:
    """The root mean square over the last dimension."""
    return values.double().square().mean(dim=-1).sqrt()


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of some tokens at each of T places, (T, tokens)."""
    size = logits.shape[1]
    some = slice(size // 8, size // 2, max(1, size * 3 // 8 // _DRAWN))
    chunks = (rows.float() for rows in torch.split(logits, _ROWS))
    return torch.cat([rows[:, some] - rows.logsumexp(dim=1, keepdim=True) for rows in chunks])


def _change_embeddings(plain: Any) -> RemovableHandle:  # noqa: ANN401 - as above
    """Each number of the embeddings a unit in the last place more or less, until the handle's context ends."""
    formats = {plain.dtype, *(getattr(part, "compute_dtype", None) or plain.dtype for part in plain.modules())}
    if torch.is_autocast_enabled(device := plain.device.type):
        formats.add(torch.get_autocast_dtype(device))
    unit = max(torch.finfo(each).eps for each in formats)
    torch.manual_seed(0)

    def change(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        signs = torch.randint_like(output, 2) * 2 - 1
        return (output.float() * (1 + unit * signs)).to(output.dtype)

    handle: RemovableHandle = plain.get_input_embeddings().register_forward_hook(change)
    return handle


def _plain_lora(loaded: Any) -> nn.Module:  # noqa: ANN401 - as above
    """An adapted layer that adds its update in the plainest way; as it is if it does more than that, as with DoRA."""
    if loaded.lora_variant:
        return loaded  # type: ignore[no-any-return]

    def forward(hidden: Tensor) -> Tensor:
        out: Tensor = loaded.base_layer(hidden)
        for name, layer in loaded.lora_B.items():
            update = hidden.float() @ loaded.lora_A[name].weight.float().T @ layer.weight.float().T
            out = out + (loaded.scaling[name] * update).to(out.dtype)
        return out

    plain: nn.Module = copy.copy(loaded)
    vars(plain)["forward"] = forward
    return plain


def _stock_model(inner: Any) -> nn.Module:  # noqa: ANN401 - as above
    """The loaded model in stock classes, on the same weights."""
    stock_type, config = stock_class(type(inner)), copy.deepcopy(inner.config)
    # Eager: Unsloth replaces other functions, and not all of them know the soft caps and sinks of attention.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with init_empty_weights(include_buffers=False):
        stock: nn.Module = stock_type._from_config(config, dtype=inner.dtype, **eager)
    for part in stock.modules():  # a text model inside another is of the loaded classes
        part.__class__ = stock_class(type(part))
    return _with_weights(stock.eval(), inner, inner.device)


def _with_weights(stock: nn.Module, loaded: nn.Module, device: torch.device) -> nn.Module:
    """A module with a loaded one's weights; the loaded one itself where these are others, as in 4 bits."""
    weights, theirs = ({n: p.shape for n, p in m.named_parameters(recurse=False)} for m in (stock, loaded))
    if "lora_A" in loaded._modules:
        return _plain_lora(loaded)
    if not (weights.items() <= theirs.items() and stock._modules.keys() <= loaded._modules.keys()):
        return loaded
    stock._parameters |= {name: loaded._parameters[name] for name in weights}
    for name, buffer in list(stock.named_buffers(recurse=False)):
        stock._buffers[name] = buffer.to(device) if name in stock._non_persistent_buffers_set else loaded._buffers[name]
    for name, child in list(stock.named_children()):
        stock._modules[name] = _with_weights(child, loaded.get_submodule(name), device)
    return stock
