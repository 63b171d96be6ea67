"""Other systems on the notes of a fold: TF-IDF, the majority class, a classification head, Unsloth's decision model.

Each function gives the K probabilities of the validation and the test notes, before calibration. `folds.py` runs and
scores them; flags of a peer are its own, such as `unsloth_decision: --epochs 12 --learning_rate 2e-4`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from medlit.base_model import missing, read_config, resolve
from medlit.data.notes import specialties_of
from medlit.data.samplers import MicroBatch, StepSampler, length_sorted_batches
from medlit.data.tokenise import tokenise
from medlit.model.checkpoints import last_step
from medlit.model.families import fit_targets, peft_targets
from medlit.model.language_model import dtype_for
from medlit.model.loading import check_stored
from medlit.model.optimizer import make_optimizer, make_schedule
from medlit.model.prior import TokenPrior, examples_of
from medlit.model.settings import LanguageModel, Lora, Optimizer
from medlit.tools.baseline import BaselineData, tfidf_probabilities

if TYPE_CHECKING:
    from datasets import Dataset
    from jsonargparse import Namespace

    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.evaluation.results import FloatArray

HEAD = "score"  # transformers' name of the last layer
Answers = dict[str, "FloatArray"]  # of `validation` and of `test`, (N, K)
Peer = Callable[[BaselineData, "TranscriptionDataModule", "Namespace", Sequence[str]], Answers]


def parts(notes: BaselineData) -> dict[str, Dataset]:
    """The notes to answer."""
    assert notes.validation is not None
    return {"validation": notes.validation, "test": notes.test}


def majority(notes: BaselineData, data: TranscriptionDataModule, config: Namespace, flags: Sequence[str]) -> Answers:
    """The shares of the specialties in training."""
    counts = np.bincount(examples_of(notes.train, notes.label_set)[1], minlength=len(notes.label_set))
    return {split: np.tile(counts / counts.sum(), (len(rows), 1)) for split, rows in parts(notes).items()}


def tfidf(notes: BaselineData, data: TranscriptionDataModule, config: Namespace, flags: Sequence[str]) -> Answers:
    """`medlit baseline`'s TF-IDF with logistic regression."""
    texts = [rows["transcription"][:] for rows in parts(notes).values()]
    return dict(zip(parts(notes), tfidf_probabilities(notes, *texts), strict=True))


def token_prior(notes: BaselineData, data: TranscriptionDataModule, config: Namespace, flags: Sequence[str]) -> Answers:
    """Medlit's own prior alone."""
    prior = TokenPrior.fit(tokenise(notes.train, data.prompt), notes.label_set)
    assert prior is not None
    return {split: np.exp(prior.of_rows(tokenise(rows, data.prompt))) for split, rows in parts(notes).items()}


def head(notes: BaselineData, data: TranscriptionDataModule, config: Namespace, flags: Sequence[str]) -> Answers:
    """The same base model with LoRA and a classification head: does writing the label in words cost or gain accuracy?

    Notes, prompt, adapter, optimizer, schedule and length are those of `medlit fit` with the same settings. Only the
    last layer differs: K scores at the prompt's last token in place of the vocabulary's. Stock transformers and PEFT;
    the last step's weights are evaluated.
    """
    language_model = LanguageModel(**config.model.language_model.as_dict())
    cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    dtype = dtype_for(device, language_model.dtype)
    torch.manual_seed(config.seed_everything if isinstance(config.seed_everything, int) else 0)
    train = tokenise(notes.train, data.prompt)
    of_answers, labels = examples_of(notes.train, notes.label_set)
    train = train if len(of_answers) == len(train) else train.select(of_answers)
    weights = np.ones(len(train), dtype=np.int64)  # all notes of a step have equal weight
    sampler = StepSampler(
        np.array(train["length"][:]), weights, labels, np.arange(len(train)), data.batching, data.token_budget
    )
    steps = last_step(config.trainer.max_steps, config.trainer.max_epochs, sampler.steps)
    pad_id = int(data.prompt.tokenizer.pad_token_id)
    model = load_head(language_model, Lora(**config.model.lora.as_dict()), len(notes.label_set), pad_id, device)
    scores = functools.partial(_scores, model, pad_id, dtype)
    optimizer_settings = Optimizer(**config.model.optimizer.as_dict())
    optimizer = make_optimizer(model, optimizer_settings)
    schedule = make_schedule(optimizer, optimizer_settings, steps)
    batches, truth = _endless(sampler), torch.from_numpy(labels).to(device)
    model.train()
    for _ in range(steps):
        for batch in itertools.islice(batches, sampler.micro_batches):
            loss = functional.cross_entropy(scores(train, batch.indices), truth[batch.indices], reduction="sum")
            (loss / batch.step_tokens).backward()  # type: ignore[no-untyped-call]
        if clip := config.trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    answers = {}
    for split, rows in parts(notes).items():
        tokens = tokenise(rows, data.prompt)
        answers[split] = np.zeros((len(rows), len(notes.label_set)))
        with torch.no_grad():
            for batch in length_sorted_batches(tokens["length"][:], data.batching.eval_batch_size, data.token_budget):
                answers[split][batch] = scores(tokens, batch).double().softmax(dim=1).cpu().numpy()
    return answers


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


def unsloth_decision(
    notes: BaselineData, data: TranscriptionDataModule, config: Namespace, flags: Sequence[str]
) -> Answers:
    """Unsloth's `FastDecisionModel`: a fresh decision head and LoRA on the same base model, trained together.

    Defaults are those of Unsloth's recipe for a language model without such a head, `scripts/train_decision_from_lm.py`
    of its repository, apart from the number of epochs, which is a flag. A note with several labels is a soft target.
    """
    from transformers import TrainingArguments
    from unsloth import DecisionTrainer, FastDecisionModel
    from unsloth.models.decision import _decision_logits  # `predict` rounds

    parser = argparse.ArgumentParser("unsloth_decision")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--head_learning_rate", type=float, default=3e-4)
    parser.add_argument("--head_warm_up", type=int, default=0, help="steps of the head alone, before the adapter")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=3407)
    options = parser.parse_args(list(flags))
    model, processor = FastDecisionModel.from_pretrained(
        str(resolve(config.model.language_model.base_model)),
        decision_head="clef",
        max_seq_length=options.max_length,
        random_state=options.seed,
    )
    question = {"type": "choice", "instructions": data.instruction, "criteria": list(notes.label_set)}

    def items(rows: Dataset) -> list[dict[str, Any]]:
        made = [
            {
                "state": {"transcription": text},
                "questions": {"specialty": question},
                "gold": {"specialty": {"probabilities": {name: 1 / len(own) for name in own}}},
            }
            for text, own in zip(rows["transcription"][:], specialties_of(rows), strict=True)
        ]
        found, report = FastDecisionModel.build_dataset(made, processor, model)
        if report["skipped"]:
            raise SystemExit(f"unsloth_decision: {report['skipped']} notes left out: {report['reason']}")
        return list(found)

    train = items(notes.train)

    def trainer(max_steps: int) -> DecisionTrainer:
        a_step = options.batch_size * options.accumulate
        steps = max_steps if max_steps > 0 else options.epochs * -(-len(train) // a_step)
        settings = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.05 * steps)),
            weight_decay=0.01,
            max_steps=max_steps,
            num_train_epochs=options.epochs,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            seed=options.seed,
        )
        rates = {"head_learning_rate": options.head_learning_rate}
        return DecisionTrainer(model=model, tokenizer=processor, train_dataset=train, args=settings, **rates)

    if options.head_warm_up:
        FastDecisionModel.freeze_backbone(model)
        trainer(options.head_warm_up).train()
        FastDecisionModel.unfreeze_backbone(model)
    model = FastDecisionModel.get_peft_model(model, r=options.r, lora_alpha=options.r, random_state=options.seed)
    trainer(options.max_steps).train()
    answers = {}
    for split, rows in parts(notes).items():
        logits, _ = _decision_logits(model, processor, items(rows), 16)
        answers[split] = torch.stack(logits).double().softmax(dim=1).numpy()
    return answers


PEERS: dict[str, Peer] = {
    "majority": majority,
    "tfidf": tfidf,
    "token_prior": token_prior,
    "head": head,
    "unsloth_decision": unsloth_decision,
}
