"""Check, before a base model is used, that medlit computes the model's own numbers.

Families of models differ in scales, caps, windows and states, and new ones appear every month; a wrong number would
look like any other. So the loss and the labels' log-likelihoods of made-up prompts, one short and one of the greatest
length, are compared with plain forward passes of the loaded model itself. Where the shared prompt of `kv_cache` does
not reproduce these, the prompt is computed again for each label; where that does not either, the model is refused.
"""

import json
import logging
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medlit._version import __version__
from medlit.atomic_io import write_json
from medlit.data.cache import cache_key
from medlit.data.collate import Batch, Prompts
from medlit.errors import WrongNumbersError
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.likelihood import LabelScorer
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import REPLAY, causal_lm, shares_prompts, text_config
from medlit.model.language_model import at_default_precision, inference_mode, loss_sum
from medlit.model.settings import LanguageModel
from medlit.paths import cache_dir

_SHORT = 5  # tokens
REMEMBERED = 1.0  # seconds from which a check that passed is not repeated for the same model and versions
_log = logging.getLogger(__name__)


def check_numbers(model: nn.Module, language_model: LanguageModel) -> None:
    """Choose how prompts are continued, and refuse a model whose numbers medlit does not reproduce.

    Raises:
        WrongNumbersError: losses or log-likelihoods differ from the model's own by more than rounding.
    """
    inner = causal_lm(model)
    record = cache_dir() / "checked" / f"{_key(inner, language_model)}.json"
    try:
        inner.__dict__[REPLAY] = bool(json.loads(record.read_text(encoding="utf-8"))["replay"])
        return
    except (OSError, ValueError, LookupError, TypeError):
        start = time.perf_counter()
    inference_mode(model)
    for replay in [False, True] if shares_prompts(model) else [True]:
        inner.__dict__[REPLAY] = replay
        if not (fault := _fault(model, language_model.max_length)):
            break
    else:
        raise WrongNumbersError(
            f"model.language_model.base_model: medlit does not reproduce the numbers of {language_model.base_model}"
            f" ({type(inner).__name__}): {fault}; choose another base model."
        )
    if inner.__dict__[REPLAY]:
        _log.info("%s: prompts are computed again for each label, which is slower", type(inner).__name__)
    if time.perf_counter() - start > REMEMBERED:
        record.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(record, {"replay": inner.__dict__[REPLAY]})


def _key(inner: Any, language_model: LanguageModel) -> str:  # noqa: ANN401 - see causal_lm
    versions = [__version__, *map(version, ("torch", "transformers", "peft", "unsloth"))]
    device = torch.cuda.get_device_name(inner.device) if inner.device.type == "cuda" else "cpu"
    # What medlit computes follows from code and configuration; other weights can still show another fault.
    files = sorted(Path(language_model.base_model).expanduser().glob("*.safetensors"))
    weights = [inner.config._commit_hash, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    config = json.dumps(inner.config.to_dict(), default=str)
    return cache_key(versions, device, str(inner.dtype), language_model, weights, config)


def _fault(model: nn.Module, max_length: int) -> str:
    """What differs and by how much; empty if nothing does."""
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None) or max_length
    longest = min(max_length, positions) if positions > 0 else max_length
    # Ids from the middle of the vocabulary, as its ends hold control tokens.
    a, b, c, d, *ids = random.Random(0).choices(range(config.vocab_size // 8, config.vocab_size // 2), k=longest)
    labels = [[a, b, c], [a, d], [b]]
    prompts = [ids[:_SHORT], ids[: longest - 4]]
    inner = causal_lm(model)
    # Lightning builds models within their device's context; what is made here is moved there where it is needed.
    with torch.device("cpu"), torch.no_grad(), at_default_precision(inner.device):
        try:
            plain = torch.stack([torch.stack([_plain(model, prompt, label) for label in labels]) for prompt in prompts])
            ours = _log_likelihoods(model, prompts, labels)
            loss = loss_sum(model, _batch(prompts, labels[0], inner.device))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _log.debug("%s", error, exc_info=True)
            return f"labels cannot be scored ({type(error).__name__})"
    compared = [(f"a label's log-likelihood after {len(p)} tokens", ours[i], plain[i]) for i, p in enumerate(prompts)]
    for name, value, reference in [*compared, ("a batch's loss", loss, -plain[:, 0].sum())]:
        difference = (value.double().cpu() - reference.double().cpu()).abs()
        wrong = ~(difference <= _rounding(reference.double().cpu(), inner.dtype))
        if wrong.any():
            return f"{name} differs by {float(difference[wrong].max()):.2g} nats"
    return ""


def _rounding(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """Differences in nats that the number format explains."""
    if dtype in (torch.float32, torch.float64):
        return 1e-3 + 1e-4 * reference.abs()
    return 0.25 + 0.02 * reference.abs()


def _plain(model: nn.Module, prompt: list[int], label: list[int]) -> Tensor:
    """Log-likelihood of a label after a prompt by the model's own forward pass, shape ()."""
    inner = causal_lm(model)
    ids = torch.tensor([prompt + label], device=inner.device)
    logits = inner(input_ids=ids, use_cache=False).logits[0, -len(label) - 1 : -1].float()
    nats: Tensor = logits.log_softmax(dim=-1).gather(1, ids[0, -len(label) :, None]).sum()
    return nats


def _log_likelihoods(model: nn.Module, prompts: list[list[int]], labels: list[list[int]]) -> Tensor:
    """Each label's log-likelihood after each prompt as medlit computes it, (2, 3)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    batch = Prompts(ids, mask, [0, 1], ["", ""], [0, 0]).on(causal_lm(model).device)
    scorer = LabelScorer(model, TokenTrie.of(labels))
    return scorer.paths(scorer.edges(read_prompts(model, batch)))


def _batch(prompts: list[list[int]], label: list[int], device: torch.device) -> Batch:
    """The prompts with the same answer, right-padded."""
    rows = [prompt + label for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    places = [row * width + len(prompt) - 1 + i for row, prompt in enumerate(prompts) for i in range(len(label))]
    targets = torch.tensor(label * len(prompts), device=device)
    lengths = [len(row) for row in rows]
    return Batch(ids, torch.tensor(places, device=device), targets, lengths, len(targets), [""] * len(rows))
