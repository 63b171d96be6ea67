"""The same base model with LoRA and a classification head: what writing the answer in words costs or gains.

Notes, prompt, adapter, optimizer, schedule and steps are those of the config; only the last layer differs: K scores at
the prompt's last token in place of the vocabulary's. Stock transformers and PEFT; the last step's weights are scored.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medlit.base_model import missing, resolve
from medlit.data.samplers import LengthSortedSampler, StepSampler
from medlit.data.tokenise import tokenise
from medlit.errors import UserError
from medlit.model.loading import check_stored
from medlit.model.optimizer import optimizer_for, schedule_for
from medlit.model.language_model import dtype_for
from medlit.model.resume import last_step
from medlit.model.settings import LanguageModel, Lora, Optimizer
from medlit.report.systems import System
from medlit.tools.baseline.notes import TestedNotes

if TYPE_CHECKING:
    from datasets import Dataset

HEAD = "score"  # what transformers calls the last layer


def classification_head(notes: TestedNotes, config: Any) -> System:  # noqa: ANN401 - jsonargparse's Namespace
    """Train on the training split, answer the test notes.

    Args:
        notes: both splits.
        config: settings, as for `medlit fit`.

    Raises:
        UserError: the base model cannot be loaded or would train in float16, the training split is smaller than a step,
            or the settings name no last step.
    """
    language_model = LanguageModel(**config.model.language_model.as_dict())
    cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    dtype = dtype_for(device, language_model.dtype)
    if dtype == torch.float16:
        raise UserError(
            "model.language_model.dtype: the classification head is not trained in float16, which 'auto' is on a GPU"
            " before"
            " Ampere; set it to 'float32' or leave out --head."
        )
    torch.manual_seed(config.seed_everything if isinstance(config.seed_everything, int) else 0)
    train, test = (tokenise(rows, notes.data.prompt) for rows in (notes.train, notes.test))
    pad = int(notes.data.prompt.tokenizer.pad_token_id)
    sampler = _sampler(notes, train)
    steps = last_step(config.trainer.max_steps, config.trainer.max_epochs, sampler.steps)
    if steps == sys.maxsize:
        raise UserError("trainer.max_steps: the classification head needs a last step; set it, or trainer.max_epochs.")
    model = load_head(language_model, Lora(**config.model.lora.as_dict()), len(notes.label_set), pad, device)
    settings = Optimizer(**config.model.optimizer.as_dict())
    _fit(model, notes, train, sampler, settings, steps, config.trainer.gradient_clip_val, dtype)
    return notes.system("head", _probabilities(model, notes, test, dtype))


def load_head(language_model: LanguageModel, lora: Lora, k: int, pad: int, device: torch.device) -> nn.Module:
    """The base model with K outputs and a fresh adapter, frozen but for adapter and head.

    Args:
        language_model: what to load.
        lora: the adapter's shape.
        k: labels.
        pad: token id that fills; the head reads the last token that is another one.
        device: where to compute.

    Raises:
        UserError: there is no such model, it is neither cached nor within reach, or it is stored in 4 bits against what
            is asked for.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    where, dtype = resolve(language_model.base_model), dtype_for(device, language_model.dtype)
    quantisation = None
    try:
        settings = AutoConfig.from_pretrained(where, revision=language_model.revision, num_labels=k, pad_token_id=pad)
    except (OSError, ValueError) as error:
        raise missing(language_model.base_model, language_model.revision) from error
    check_stored(language_model, settings)
    if given := getattr(settings, "quantization_config", None):
        # Quantised by its publisher, who knew of no head.
        given["llm_int8_skip_modules"] = [*(given.get("llm_int8_skip_modules") or []), HEAD]
    elif language_model.load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[HEAD],
        )
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            where,
            revision=language_model.revision,
            config=settings,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": str(device)},
        )
    except OSError as error:
        raise missing(language_model.base_model, language_model.revision) from error
    if language_model.gradient_checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shape = LoraConfig(task_type="SEQ_CLS", modules_to_save=[HEAD], **lora.as_peft())
    adapted: nn.Module = get_peft_model(model, shape)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _sampler(notes: TestedNotes, train: Dataset) -> StepSampler:
    data = notes.data
    return StepSampler(
        train["length"][:],
        [1] * len(train),  # a step's notes weigh alike
        global_batch_size=data.global_batch_size,
        batch_size=data.batch_size,
        token_budget=data.token_budget,
        seed=data.seed,
        labels=notes.labels(train).tolist(),
        balance=data.balance,
    )


def _fit(
    model: nn.Module,
    notes: TestedNotes,
    train: Dataset,
    sampler: StepSampler,
    settings: Optimizer,
    steps: int,
    clip: float | None,
    dtype: torch.dtype,
) -> None:
    from rich.progress import track

    labels = torch.from_numpy(notes.labels(train))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_for(model, settings)
    schedule = schedule_for(optimizer, settings, steps)
    batches = _endless(sampler)
    model.train()
    for _ in track(range(steps), "Training the classification head"):
        for _ in range(sampler.micro_batches):
            batch = next(batches)
            scores = _scores(model, train, batch.indices, notes, dtype)
            loss = functional.cross_entropy(scores, labels[batch.indices].to(scores.device), reduction="sum")
            (loss / batch.step_tokens).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _endless(sampler: StepSampler) -> Iterator[Any]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1


def _probabilities(model: nn.Module, notes: TestedNotes, test: Dataset, dtype: torch.dtype) -> np.ndarray:
    out = np.zeros((len(test), len(notes.label_set)))
    model.eval()
    with torch.no_grad():
        for rows in LengthSortedSampler(test["length"][:], notes.data.eval_batch_size, notes.data.token_budget):
            out[rows] = _scores(model, test, rows, notes, dtype).double().softmax(dim=1).cpu().numpy()
    return out


def _scores(model: nn.Module, table: Dataset, rows: list[int], notes: TestedNotes, dtype: torch.dtype) -> Tensor:
    """Logits of B notes, float32, (B, K)."""
    pad = int(notes.data.prompt.tokenizer.pad_token_id)
    ids = table[rows]["input_ids"]
    width = max(map(len, ids))
    device = next(model.parameters()).device
    padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    half = device.type == "cuda" and dtype != torch.float32
    mixed = torch.autocast("cuda", dtype=dtype) if half else contextlib.nullcontext()
    with mixed:
        scores: Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return scores.float()
