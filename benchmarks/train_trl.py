"""The peers of the training benchmark, each in a separate process: TRL's SFTTrainer on PEFT, on Unsloth, and tuned.

    python benchmarks/train_trl.py SYSTEM MODEL STEPS.json OUT.json --warm_up 3

STEPS.json is a list of optimizer steps, each a list of notes: a note's token ids and how many of them are its answer.
Settings are the recipe's: 8 notes x 4, 8-bit AdamW, LoRA r 16 in all projections, recomputation, loss over the whole
text. `unsloth_trl_tuned` tries those that make Unsloth + TRL fast, one after another, each on a newly loaded model;
`unsloth_trl_tuned_fp8` does so on FP8 weights (`load_in_fp8`), for which Unsloth needs torchao and a Hopper GPU.
Unsloth itself puts the notes of a micro-batch end to end ("padding-free") where it can, unless `padding_free=False`.
The libraries are imported first; then a line is awaited on standard input, so that the GPU is still another's while
they are. The file is written again after each setting.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONGEST = 2048


@dataclass(frozen=True)
class Setting:
    """How a peer trains: the defaults are the recipe's."""

    setting: str = "8 x 4 notes, recomputed"
    batch: int = 8  # notes of a micro-batch; packed rows are as many as hold a step's tokens
    accumulate: int = 4
    recompute: bool = True
    answer_only: bool = False  # loss
    packing: bool = False  # rows of LONGEST tokens with several notes each
    padding_free: bool | None = None  # None: as Unsloth decides


def _tuned(setting: str, batch: int, accumulate: int, **others: Any) -> Setting:  # noqa: ANN401
    return Setting(setting, batch, accumulate, **{"recompute": False, "answer_only": True} | others)


TUNED = {
    each.setting: each
    for each in (
        _tuned("16 x 2 notes", 16, 2),
        _tuned("8 x 4 notes", 8, 4),
        _tuned("packed rows x 2", 0, 2, packing=True),
        _tuned("16 x 2 padded notes", 16, 2, padding_free=False),
        _tuned("16 x 2 notes, recomputed", 16, 2, recompute=True),  # if nothing else fits
    )
}
SYSTEMS = ("peft_trl", "unsloth_trl", "unsloth_trl_tuned", "unsloth_trl_tuned_fp8")


def main() -> None:
    """Train with each setting, and write the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", type=Path)
    parser.add_argument("steps", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="layers that LoRA adapts")
    parser.add_argument("--settings", nargs="+", choices=TUNED, default=list(TUNED), help="of the tuned peer")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no setting is begun")
    args = parser.parse_args()
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
    if args.system != "peft_trl":
        import unsloth  # noqa: F401 - before transformers
    import torch
    import trl  # noqa: F401 - seconds that nobody should time

    sys.stdin.readline()
    steps: list[list[tuple[list[int], int]]] = json.loads(args.steps.read_text())
    tried: list[dict[str, Any]] = []
    tuned = args.system.startswith("unsloth_trl_tuned")
    for setting in [TUNED[name] for name in args.settings] if tuned else [Setting()]:
        row: dict[str, Any] = asdict(setting)
        measured = [other for other in tried if "step_seconds" in other]
        if tuned and setting.recompute and measured:
            row["error"] = "not tried: others fit without recomputation"
        elif setting.padding_free is False and any(not other["padding_free"] for other in measured):
            row["error"] = "not tried: Unsloth pads this family in any case"
        elif tried and time.perf_counter() - BEGIN > args.limit:
            row["error"] = "not tried: no time left"
        else:
            row |= _measure(args, setting, steps)
        tried.append(row)
        args.out.write_text(json.dumps({"system": args.system, "warm_up": args.warm_up, "tried": tried}))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch._dynamo.reset()


def _measure(args: argparse.Namespace, setting: Setting, steps: list[list[tuple[list[int], int]]]) -> dict[str, Any]:
    """What a setting takes; too little memory, or a fault of a peer, is a result."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        # What it prints is no part of the result.
        with contextlib.redirect_stdout(sys.stderr):
            if args.system == "peft_trl":
                model, tokenizer, peft = _plain(args.model, args.targets, cuda)
            else:
                fp8 = args.system.endswith("_fp8")
                model, tokenizer, peft = _unsloth(args.model, args.targets, setting.recompute, cuda, fp8)
            return _train(model, tokenizer, peft, steps, setting, cuda)
    except Exception as error:
        import traceback

        traceback.print_exc()
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": "does not fit" if full else text[:300]}


def _unsloth(folder: Path, targets: list[str], recompute: bool, cuda: bool, fp8: bool) -> tuple[Any, Any, None]:
    import torch
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if cuda else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=LONGEST,
        load_in_4bit=not fp8,
        dtype=dtype,
        **({"load_in_fp8": True} if fp8 else {}),  # unknown to Unsloth's loader for a CPU
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        use_gradient_checkpointing="unsloth" if recompute else False,
        random_state=3407,
    )
    return model, tokenizer, None


def _plain(folder: Path, targets: list[str], cuda: bool) -> tuple[Any, Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if cuda else torch.float32
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantized, dtype=dtype, device_map={"": "cuda:0" if cuda else "cpu"}
    )
    peft = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=targets, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(folder), peft


def _train(
    model: Any,  # noqa: ANN401 - transformers' models share no typed base
    tokenizer: Any,  # noqa: ANN401
    peft: Any,  # noqa: ANN401
    steps: list[list[tuple[list[int], int]]],
    setting: Setting,
    cuda: bool,
) -> dict[str, Any]:
    import torch
    import torch._dynamo.utils
    from datasets import Dataset
    from torch.utils.data import RandomSampler, Sampler, SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []
    graphs: list[int] = []
    recomputed: list[int] = []  # layers
    seen: list[tuple[int, int, int]] = []  # cells, real tokens and supervised tokens of a micro-batch

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            if not ends:
                ends.append(now())

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(now())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            recomputed.append(sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers))

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object, **__: object) -> Sampler[int]:
            if setting.packing:  # rows with few, long notes come first
                return RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(0))
            return SequentialSampler(self.train_dataset)

    notes = [note for step in steps for note in step]
    columns = {"input_ids": [ids for ids, _ in notes]}
    if setting.answer_only:
        columns["completion_mask"] = [[0] * (len(ids) - answer) + [1] * answer for ids, answer in notes]
    # Rows that hold as many tokens as a step's notes.
    packed_rows = round(sum(len(ids) for ids, _ in notes) / len(steps) / setting.accumulate / LONGEST)
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=max(1, packed_rows) if setting.packing else setting.batch,
        gradient_accumulation_steps=setting.accumulate,
        warmup_steps=5,
        max_steps=len(steps),
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        optim="adamw_8bit" if cuda else "adamw_torch",
        weight_decay=0.01,
        bf16=cuda,
        fp16=False,
        seed=3407,
        logging_steps=1,
        packing=setting.packing,
        completion_only_loss=setting.answer_only,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=LONGEST,
        use_cpu=not cuda,
        **({} if setting.recompute else {"gradient_checkpointing": False}),
        **({} if setting.padding_free is None else {"padding_free": setting.padding_free}),
    )
    trainer = InOrder(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(columns),
        args=settings,
        peft_config=peft,
        callbacks=[Clock()],
    )
    if setting.packing and not trainer.args.packing:
        raise ValueError("Unsloth does not pack this model here")
    layers = [module for module in trainer.model.modules() if hasattr(module, "self_attn")]
    collate = trainer.data_collator

    def counting(rows: list[Any]) -> Any:  # noqa: ANN401
        batch = collate(rows)
        mask, cells = batch.get("attention_mask"), batch["input_ids"].numel()
        seen.append((cells, cells if mask is None else int(mask.sum()), int((batch["labels"] != -100).sum())))
        return batch

    trainer.data_collator = counting
    attention = _attention(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if cuda else 0
    trainer.train()
    size = setting.accumulate
    of_steps = [map(sum, zip(*seen[i : i + size], strict=True)) for i in range(0, len(steps) * size, size)]
    cells, tokens, supervised = (list(counts) for counts in zip(*of_steps, strict=True))
    return {
        "batch": settings.per_device_train_batch_size,
        "packing": bool(trainer.args.packing),
        "padding_free": bool(getattr(collate, "padding_free", False)),
        "attention": {k: v - attention[k] if isinstance(v, int) else v for k, v in _attention(cuda).items()},
        "layers_recomputed": recomputed[-1],
        "lora_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "step_seconds": [end - start for start, end in pairwise(ends)],
        "cells": cells,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "graphs": graphs,
        "loaded_gib": loaded / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


def _attention(cuda: bool) -> dict[str, Any]:
    """What Unsloth computes attention over notes end to end with.

    `own` serves the families whose attention is Unsloth's: a varlen kernel, or `sdpa`, which is a call for each note
    unless PyTorch's varlen kernel is new enough (2.12). The counts are of those whose attention is transformers'.
    """
    if not cuda or "unsloth" not in sys.modules:
        return {}
    from unsloth.utils import attention_dispatch, hf_packed_attention

    own = attention_dispatch.select_attention_backend(use_varlen=True)
    has_varlen = attention_dispatch._TORCH_VARLEN_ATTN is not None
    counts = hf_packed_attention.HF_PACKED_ATTENTION_STATS
    return {
        "own": "torch varlen" if own == "sdpa" and has_varlen else own,
        "varlen_calls": counts["fast"] + counts["compiled"],
        "other_calls": counts["fallback"],
    }


if __name__ == "__main__":
    main()
