"""The same base model with LoRA and a classification head: does writing the label in words cost or gain accuracy?

Notes, prompt, adapter, optimizer, schedule and number of steps are those of the config. Only the last layer differs: K
scores at the prompt's last token in place of the vocabulary's. Stock transformers and PEFT; the last step's weights are
evaluated.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from medlit.base_model import missing, read_config, resolve
from medlit.data.samplers import LengthSortedSampler, MicroBatch, StepSampler
from medlit.data.tokenise import tokenise
from medlit.errors import UserError
from medlit.model.checkpoints import last_step
from medlit.model.families import fit_targets, peft_targets
from medlit.model.language_model import dtype_for
from medlit.model.loading import check_stored
from medlit.model.optimizer import make_optimizer, make_schedule
from medlit.model.settings import LanguageModel, Lora, Optimizer
from medlit.report.systems import System
from medlit.tools.baseline import BaselineData

if TYPE_CHECKING:
    from datasets import Dataset
    from jsonargparse import Namespace

    from medlit.data.datamodule import TranscriptionDataModule

HEAD = "score"  # transformers' name of the last layer


def classification_head(notes: BaselineData, data: TranscriptionDataModule, config: Namespace) -> System:
    """Train on the training split and answer the test notes, with settings as for `medlit fit`."""
    from rich.progress import track

    if config.model.lora is None:
        raise UserError("model.lora: the classification head trains an adapter; give its settings or leave out --head.")
    language_model = LanguageModel(**config.model.language_model.as_dict())
    cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    dtype = dtype_for(device, language_model.dtype)
    if dtype == torch.float16:
        raise UserError(
            "model.language_model.dtype: the classification head does not train in float16, which 'auto' means on a"
            " GPU before Ampere; set it to 'float32' or leave out --head."
        )
    if last_step(config.trainer.max_steps, config.trainer.max_epochs, 1) == sys.maxsize:
        raise UserError("trainer.max_steps: the classification head needs a last step; set it, or trainer.max_epochs.")
    torch.manual_seed(config.seed_everything if isinstance(config.seed_everything, int) else 0)
    train, test = (tokenise(rows, data.prompt) for rows in (notes.train, notes.test))
    of_answers, labels = notes.answers()
    train = train if len(of_answers) == len(train) else train.select(of_answers)
    weights = np.ones(len(train), dtype=np.int64)  # all notes of a step have equal weight
    sampler = StepSampler(np.array(train["length"][:]), weights, labels, data.batching, data.token_budget)
    steps = last_step(config.trainer.max_steps, config.trainer.max_epochs, sampler.steps)
    pad_id = int(data.prompt.tokenizer.pad_token_id)
    model = load_head(language_model, Lora(**config.model.lora.as_dict()), len(notes.label_set), pad_id, device)
    scores = functools.partial(_scores, model, pad_id, dtype)
    optimizer_settings = Optimizer(**config.model.optimizer.as_dict())
    optimizer = make_optimizer(model, optimizer_settings)
    schedule = make_schedule(optimizer, optimizer_settings, steps)
    batches, truth = _endless(sampler), torch.from_numpy(labels).to(device)
    model.train()
    for _ in track(range(steps), "Training the classification head"):
        for batch in itertools.islice(batches, sampler.micro_batches):
            loss = functional.cross_entropy(scores(train, batch.indices), truth[batch.indices], reduction="sum")
            (loss / batch.step_tokens).backward()  # type: ignore[no-untyped-call]
        if clip := config.trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    probabilities = np.zeros((len(test), len(notes.label_set)))
    with torch.no_grad():
        for rows in LengthSortedSampler(test["length"][:], data.batching.eval_batch_size, data.token_budget):
            probabilities[rows] = scores(test, rows).double().softmax(dim=1).cpu().numpy()
    return notes.system("head", probabilities)


def load_head(language_model: LanguageModel, lora: Lora, k: int, pad_id: int, device: torch.device) -> nn.Module:
    """The base model with K outputs and a fresh adapter; only adapter and head are trainable.

    The head reads the last token that is not the padding token.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    path, revision = resolve(language_model.base_model), language_model.revision
    dtype = dtype_for(device, language_model.dtype)
    settings = read_config(language_model.base_model, revision)
    settings.num_labels, settings.pad_token_id = k, pad_id
    check_stored(language_model, settings)
    quantisation = None
    if stored := getattr(settings, "quantization_config", None):
        # Quantised by its publisher, without a head.
        stored["llm_int8_skip_modules"] = [*(stored.get("llm_int8_skip_modules") or []), HEAD]
    elif language_model.load_in_4bit:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantisation = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[HEAD], **kind)
    try:
        loading = {"revision": revision, "config": settings, "dtype": dtype, "quantization_config": quantisation}
        model = AutoModelForSequenceClassification.from_pretrained(path, device_map={"": str(device)}, **loading)
    except OSError as error:
        raise missing(language_model.base_model, revision) from error
    if language_model.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = fit_targets(model, lora)
    shape = LoraConfig(task_type="SEQ_CLS", modules_to_save=[HEAD], **lora.as_peft() | peft_targets(model, lora))
    adapted: nn.Module = get_peft_model(model, shape)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _endless(sampler: StepSampler) -> Iterator[MicroBatch]:
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


def _scores(model: nn.Module, pad_id: int, dtype: torch.dtype, notes: Dataset, rows: list[int]) -> Tensor:
    """Logits of B notes, float32, (B, K)."""
    device = next(model.parameters()).device
    ids = [torch.tensor(row) for row in notes[rows]["input_ids"]]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
    with torch.autocast(device.type, dtype, enabled=device.type == "cuda" and dtype != torch.float32):
        logits: Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return logits.float()
