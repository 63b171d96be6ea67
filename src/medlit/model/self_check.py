"""Check, before a base model is used, that medlit computes the model's own numbers.

Families of models differ in scales, caps, windows and states, and new ones appear every month; a wrong number would
look like any other. So the loss and the labels' log-likelihoods of made-up prompts, one short, one of the greatest
length and some that begin alike, are compared with plain forward passes over the loaded weights. These run through
stock classes of transformers, since Unsloth replaces the loaded ones on a GPU and makes mistakes itself. Where the
shared prompt of `kv_cache` does not reproduce the numbers, it is computed again for each label; where that does not
either, the model is refused.
"""

import contextlib
import copy
import json
import logging
import random
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from medlit.atomic_io import write_json
from medlit.data.cache import cache_key
from medlit.data.collate import Collator, unnamed_rows
from medlit.data.prompt import Prompt
from medlit.errors import WrongNumbersError, best_effort, tell
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.likelihood import LabelScorer
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import REPLAY, causal_lm, shares_prompts, text_config
from medlit.model.head import head_logits
from medlit.model.language_model import at_default_precision, inference_mode, loss_sum
from medlit.model.settings import LanguageModel
from medlit.paths import __version__, cache_dir
from medlit.unsloth_first import stock_class

_SHORT, _ALIKE = 5, 32  # tokens of a prompt, and of a common beginning that a CPU computes once for four prompts
REMEMBERED = 1.0  # seconds from which a check that passed is not repeated for the same model and versions
_USED = "torch transformers peft unsloth unsloth_zoo bitsandbytes triton torchao flash-linear-attention causal-conv1d"
_log = logging.getLogger(__name__)


def check_numbers(model: nn.Module, language_model: LanguageModel) -> None:
    """Choose how prompts are continued; a WrongNumbersError where the numbers differ by more than rounding."""
    inner = causal_lm(model)
    record = cache_dir() / "checked" / f"{_key(inner, language_model)}.json"
    try:
        inner.__dict__[REPLAY] = bool(json.loads(record.read_text(encoding="utf-8"))["replay"])
        return
    except (OSError, ValueError, LookupError, TypeError):
        start = time.perf_counter()
    if inner.device.type == "cpu":  # a GPU takes about a second
        what = f"the numbers of {language_model.base_model} against plain transformers"
        tell(f"checking {what}; up to minutes on a CPU, again when settings or versions change")
    inference_mode(model)
    for replay in [False, True] if shares_prompts(model) else [True]:
        inner.__dict__[REPLAY] = replay
        fault, is_stock = _fault(model, language_model.max_length)
        if not fault:
            break
    else:
        raise WrongNumbersError(
            f"model.language_model.base_model: medlit does not reproduce the numbers of {language_model.base_model}"
            f" ({type(inner).__name__}): {fault}; choose another base model."
        )
    if inner.__dict__[REPLAY]:
        _log.info("%s: prompts are computed again for each label, which is slower", type(inner).__name__)
    if is_stock and time.perf_counter() - start > REMEMBERED:
        with best_effort("the record of its check of numbers"):  # the cache may be read-only
            record.parent.mkdir(mode=0o700, exist_ok=True)
            write_json(record, {"replay": inner.__dict__[REPLAY]})


def _key(inner: Any, language_model: LanguageModel) -> str:  # noqa: ANN401 - see causal_lm
    versions = ["common beginning", __version__]
    for package in _USED.split():
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    device = torch.cuda.get_device_name(inner.device) if inner.device.type == "cuda" else "cpu"
    # What medlit computes follows from code and configuration; other weights can still show another fault.
    folder = Path(language_model.base_model).expanduser()
    files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin") and f.is_file())
    weights = [inner.config._commit_hash, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    weights += [(name, *each.shape) for name, each in inner.named_parameters() if "lora_" in name]
    config = json.dumps(inner.config.to_dict(), default=str)
    settings = replace(language_model, gradient_checkpointing="auto", memory_budget_gib=None)  # both for training alone
    settings = replace(settings, prompt_format="alpaca", batch_tokens=0)
    return cache_key(versions, device, str(inner.dtype), settings, weights, config)


def _fault(model: nn.Module, longest: int) -> tuple[str, bool]:
    """What differs and by how much, empty if nothing does; and whether stock classes of transformers say so."""
    config = text_config(model)
    # Ids from the middle of the vocabulary, as its ends hold control tokens.
    a, b, c, d, *ids = random.Random(0).choices(range(config.vocab_size // 8, config.vocab_size // 2), k=longest)
    labels = [[a, b, c], [a, d], [b]]
    # A CPU computes prompts that begin alike by separate code; a GPU computes the beginning of any prompts once.
    alike = min(_ALIKE, longest // 2)
    batches = [[ids[:_SHORT], ids[: longest - 4]], [ids[:alike] + ids[alike + i : alike + 3 * i] for i in range(1, 5)]]
    inner = causal_lm(model)
    batches = batches[: 1 + (inner.device.type == "cpu")]
    # Nothing is compiled for a few passes, which took a minute. Lightning builds models within their device's context;
    # what is made here is moved there where it is needed.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.device("cpu"), torch.no_grad(), at_default_precision(inner.device):
        collator = Collator(lambda _: labels[0], pad_id=0, label_names=("",))
        compared = list[tuple[str, Tensor, Tensor]]()
        try:
            plain, is_stock = _plain(inner, [*chain(*batches)], labels)
            scorer = LabelScorer(model, TokenTrie.of(labels))
            for prompts, theirs in zip(batches, torch.split(plain, [*map(len, batches)]), strict=True):
                batch = collator.evaluate(unnamed_rows([Prompt(prompt, 0) for prompt in prompts]))
                batch = move_data_to_device(batch, inner.device)
                prefix = read_prompts(model, batch.prompts)
                ours = scorer.paths(scorer.edges(prefix))
                names = [f"a label's log-likelihood after {len(prompt)} tokens" for prompt in prompts]
                compared += [*zip(names, ours, theirs, strict=True)]
                compared += [("a batch's loss", loss_sum(model, batch.loss), -theirs[:, 0].sum())]
                nats = torch.zeros_like(ours[:, 0])
                for token in labels[0]:
                    nats += head_logits(model, prefix.last).log_softmax(dim=1)[:, token]
                    tokens = torch.full_like(prefix.lengths, token)[:, None]
                    prefix = prefix.extend(tokens, tokens == token)
                compared += [("the log-likelihood of generated tokens", nats, theirs[:, 0])]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _log.debug("%s", error, exc_info=True)
            return f"labels cannot be scored ({type(error).__name__})", False
    # Differences in nats that the number format explains; 4-bit layers may compute in another one than the rest.
    formats = {inner.dtype, *(getattr(part, "compute_dtype", None) or inner.dtype for part in inner.modules())}
    absolute, relative = (1e-3, 1e-4) if formats <= {torch.float32, torch.float64} else (0.25, 0.02)
    for name, value, reference in compared:
        difference = (value.double().cpu() - reference.double().cpu()).abs()
        wrong = ~(difference <= absolute + relative * reference.double().cpu().abs())
        if wrong.any():
            return f"{name} differs by {float(difference[wrong].max()):.2g} nats", is_stock
    return "", is_stock


def _plain(inner: Any, prompts: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, bool]:  # noqa: ANN401
    """Each label's log-likelihood after each prompt by plain passes, (prompts, labels); whether of stock classes."""
    try:
        nats = _forwards(_stock_model(inner), prompts, labels)
        if nats.isfinite().all():
            return nats, True
    except Exception as error:
        _log.debug("%s", error, exc_info=True)
    # Stock classes may not fit the weights, the memory or the number format; the loaded ones at least run.
    _log.info("%s is checked without stock classes of transformers", type(inner).__name__)
    return _forwards(inner, prompts, labels), False


def _forwards(plain: Any, prompts: list[list[int]], labels: list[list[int]]) -> Tensor:  # noqa: ANN401 - as above
    nats = []
    for prompt, label in product(prompts, labels):
        ids = torch.tensor([prompt + label], device=plain.device)
        logits = plain(input_ids=ids, use_cache=False).logits[0, -len(label) - 1 : -1].float()
        nats.append(logits.log_softmax(dim=-1).gather(1, ids[0, -len(label) :, None]).sum())
    return torch.stack(nats).view(len(prompts), len(labels))


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
    """A module with a loaded one's weights; the loaded one itself where these are others, as in 4 bits or with LoRA."""
    weights, theirs = ({n: p.shape for n, p in m.named_parameters(recurse=False)} for m in (stock, loaded))
    if not (weights.items() <= theirs.items() and stock._modules.keys() <= loaded._modules.keys()):
        return loaded
    stock._parameters |= {name: loaded._parameters[name] for name in weights}
    for name, buffer in list(stock.named_buffers(recurse=False)):
        computed = name in stock._non_persistent_buffers_set
        stock._buffers[name] = buffer.to(device) if computed else loaded._buffers[name]
    for name, child in list(stock.named_children()):
        stock._modules[name] = _with_weights(child, loaded.get_submodule(name), device)
    return stock
