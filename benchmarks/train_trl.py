"""The two peers of the training benchmark, each in a separate process: TRL's SFTTrainer on PEFT, and on Unsloth.

    python benchmarks/train_trl.py peft_trl|unsloth_trl MODEL STEPS.json OUT.json --warm_up 3

STEPS.json is a list of optimizer steps, each a list of notes' token ids. Settings are the recipe's: 8 notes x 4, 8-bit
AdamW, LoRA r 16 in all projections, loss over the whole text. The libraries are imported first; then a line is awaited
on standard input, so that the GPU is still another's while they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATE = 8, 4


def main() -> None:
    """Train, and write the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=["peft_trl", "unsloth_trl"])
    parser.add_argument("model", type=Path)
    parser.add_argument("steps", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--warm_up", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
    if args.system == "unsloth_trl":
        import unsloth  # noqa: F401 - before transformers
    import torch
    import trl  # noqa: F401 - seconds that nobody should time

    steps: list[list[list[int]]] = json.loads(args.steps.read_text())
    sys.stdin.readline()
    cuda = torch.cuda.is_available()
    model, tokenizer, peft = (_unsloth if args.system == "unsloth_trl" else _plain)(args.model, cuda)
    result = _train(model, tokenizer, peft, steps, args.warm_up, cuda)
    args.out.write_text(json.dumps({"system": args.system, **result}))


def _unsloth(folder: Path, cuda: bool) -> tuple[Any, Any, None]:
    import torch
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if cuda else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=2048, load_in_4bit=True, dtype=dtype
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    return model, tokenizer, None


def _plain(folder: Path, cuda: bool) -> tuple[Any, Any, Any]:
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
    peft = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(folder), peft


def _train(
    model: Any,  # noqa: ANN401 - transformers' models share no typed base
    tokenizer: Any,  # noqa: ANN401
    peft: Any,  # noqa: ANN401
    steps: list[list[list[int]]],
    warm_up: int,
    cuda: bool,
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []
    cells: list[int] = []

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

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object, **__: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
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
        packing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=2048,
        use_cpu=not cuda,
    )
    notes = Dataset.from_dict({"input_ids": [note for step in steps for note in step]})
    # What it prints is no part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        trainer = InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=notes,
            args=settings,
            peft_config=peft,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counting(rows: list[Any]) -> Any:  # noqa: ANN401
            batch = collate(rows)
            cells.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counting
        trainer.train()
    micro_batches = [sum(cells[i : i + ACCUMULATE]) for i in range(0, len(steps) * ACCUMULATE, ACCUMULATE)]
    return {
        "step_seconds": [end - start for start, end in pairwise(ends)],
        "cells": micro_batches,
        "warm_up": warm_up,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


if __name__ == "__main__":
    main()
