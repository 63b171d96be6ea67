"""The same base model with LoRA and a classification head: what writing the answer in words costs or gains.

Notes, prompt, adapter, optimizer, schedule and steps are those of the config; only the last layer differs: K scores at
the prompt's last token in place of the vocabulary's. Stock transformers and PEFT; the last step's weights are scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medlit.data.samplers import LengthSortedSampler, StepSampler, micro_batches_per_step
from medlit.data.tokens import tokenise
from medlit.model.backbone import dtype_for
from medlit.model.settings import Backbone, Lora, Optimizer
from medlit.report.systems import System
from medlit.tools.baseline.notes import TestedNotes
from medlit.weights import resolve

if TYPE_CHECKING:
    from datasets import Dataset

HEAD = "score"  # what transformers calls the last layer


def classification_head(notes: TestedNotes, config: Any) -> System:  # noqa: ANN401 - jsonargparse's Namespace
    """Train on the training split, answer the test notes.

    Args:
        notes: both splits.
        config: settings, as for `medlit fit`.

    Raises:
        UserError: the base model cannot be loaded, or the training split is smaller than a step.
    """
    backbone = Backbone(**config.model.backbone.as_dict())
    cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    torch.manual_seed(config.seed_everything if isinstance(config.seed_everything, int) else 0)
    train, test = (tokenise(rows, notes.data.prompt) for rows in (notes.train, notes.test))
    pad = int(notes.data.prompt.tokenizer.pad_token_id)
    model = load_head(backbone, Lora(**config.model.lora.as_dict()), len(notes.label_set), pad, device)
    per_epoch = max(1, len(train) // notes.data.examples_per_step)
    steps = config.trainer.max_steps if config.trainer.max_steps > 0 else config.trainer.max_epochs * per_epoch
    settings = Optimizer(**config.model.optimizer.as_dict())
    _fit(model, notes, train, settings, steps, config.trainer.gradient_clip_val)
    return notes.system("head", _probabilities(model, notes, test))


def load_head(backbone: Backbone, lora: Lora, k: int, pad: int, device: torch.device) -> nn.Module:
    """The base model with K outputs and a fresh adapter, frozen but for adapter and head.

    Args:
        backbone: what to load.
        lora: the adapter's shape.
        k: labels.
        pad: token id that fills; the head reads the last token that is another one.
        device: where to compute.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    where, dtype = resolve(backbone.base_model), dtype_for(device, backbone.dtype)
    settings = AutoConfig.from_pretrained(where, revision=backbone.revision, num_labels=k, pad_token_id=pad)
    quantisation = None
    if given := getattr(settings, "quantization_config", None):
        # Quantised by its publisher, who knew of no head.
        given["llm_int8_skip_modules"] = [*(given.get("llm_int8_skip_modules") or []), HEAD]
    elif backbone.load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[HEAD],
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        where,
        revision=backbone.revision,
        config=settings,
        dtype=dtype,
        quantization_config=quantisation,
        device_map={"": str(device)},
    )
    if backbone.gradient_checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shape = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=list(lora.target_modules),
        use_rslora=lora.rslora,
        modules_to_save=[HEAD],
    )
    adapted: nn.Module = get_peft_model(model, shape)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _fit(
    model: nn.Module, notes: TestedNotes, train: Dataset, settings: Optimizer, steps: int, clip: float | None
) -> None:
    from bitsandbytes.optim import AdamW8bit
    from rich.progress import track
    from transformers import get_linear_schedule_with_warmup

    data, labels = notes.data, torch.from_numpy(notes.labels(notes.train))
    sampler = StepSampler(
        train["length"][:],
        [1] * len(train),  # a step's notes weigh alike
        examples_per_step=data.examples_per_step,
        batch_size=data.batch_size,
        token_budget=data.token_budget,
        seed=data.seed,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, steps)
    micro_batches = micro_batches_per_step(data.examples_per_step, data.batch_size, 1)
    batches = _endless(sampler)
    model.train()
    for _ in track(range(steps), "Training the classification head"):
        for _ in range(micro_batches):
            batch = next(batches)
            scores = _scores(model, train, batch.indices, notes)
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


def _probabilities(model: nn.Module, notes: TestedNotes, test: Dataset) -> np.ndarray:
    out = np.zeros((len(test), len(notes.label_set)))
    model.eval()
    with torch.no_grad():
        for rows in LengthSortedSampler(test["length"][:], notes.data.eval_batch_size, notes.data.token_budget):
            out[rows] = _scores(model, test, rows, notes).double().softmax(dim=1).cpu().numpy()
    return out


def _scores(model: nn.Module, table: Dataset, rows: list[int], notes: TestedNotes) -> Tensor:
    """Logits of B notes, float32, (B, K)."""
    pad = int(notes.data.prompt.tokenizer.pad_token_id)
    ids = table[rows]["input_ids"]
    width = max(map(len, ids))
    device = next(model.parameters()).device
    padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    mixed = torch.autocast("cuda", dtype=dtype_for(device)) if device.type == "cuda" else contextlib.nullcontext()
    with mixed:
        scores: Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return scores.float()
