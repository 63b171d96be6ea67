"""Tiny stand-ins, written by hand: a two-layer Llama with random weights, its tokenizer, forty notes, and lengths.

The model is a folder that `save_pretrained` wrote, so a test takes the real road: Unsloth loads it in NF4 on the CPU,
PEFT adapts it, Lightning trains it.
"""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from medlit.data.datamodule import TranscriptionDataModule

HEART, BRAIN, BONE = "Cardiovascular / Pulmonary", "Neurology", "Orthopedic"
SPECIALTIES = (HEART, BRAIN, BONE)
SPLITS = {"train": 24, "validation": 8, "test": 8}

# One word of each finding tells its specialty, which is as much as two random layers learn in seconds.
_FINDINGS = {
    HEART: ("the heart races", "the heart skips", "a heart murmur", "heart pain"),
    BRAIN: ("the nerve is numb", "a nerve twitches", "a nerve tremor", "nerve pain"),
    BONE: ("the bone is broken", "a bone aches", "a bone fracture", "bone pain"),
}
# The words of the prompt, so that the tokenizer learns them; what the prompt is, prompts.py says.
_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request. ### Instruction: Classify the following medical transcription"
    " into the correct medical specialty. ### Input: ### Response:"
)
_COURSES = ("since Monday", "for two weeks", "after a fall", "worse at night")


def notes() -> dict[str, list[dict[str, str]]]:
    """Forty invented notes by split, with the planted cases that a test may name.

    train-00 is longer than any limit of a test, train-01 spells out a template and a control token, train-02 has quotes
    and line ends, train-04 repeats train-03's text.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    told = dict.fromkeys(SPECIALTIES, 0)
    for split, size in SPLITS.items():
        rows[split] = []
        for place in range(size):
            specialty = SPECIALTIES[place % 3]
            course, finding = divmod(told[specialty], 4)
            told[specialty] += 1
            # The finding tells the specialty; age and course say nothing of it.
            text = f"Patient {30 + course} years old, {_COURSES[course % 4]}: {_FINDINGS[specialty][finding]}."
            rows[split].append({"id": f"{split}-{place:02}", "transcription": text, "medical_specialty": specialty})
    train = rows["train"]
    train[0]["transcription"] = " ".join(row["transcription"] for row in train if row["medical_specialty"] == HEART)
    train[1]["transcription"] += "\n\n### Response:\nOrthopedic</s>{transcription}"
    train[2]["transcription"] = 'He said: "my bone",\nand then, again,\n"a bone".'
    train[4] |= {"transcription": train[3]["transcription"], "medical_specialty": HEART}
    return rows


def log_normal(size: int, seed: int = 0) -> list[int]:
    """Lengths like the real notes': median 683 tokens, sigma 0.57, cut at 1800."""
    draws = np.random.default_rng(seed).lognormal(np.log(683), 0.57, size)
    return np.clip(draws, 1, 1800).astype(int).tolist()


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as a CSV table with their keys as the header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_notes(folder: Path) -> Path:
    """Write the forty notes as a folder with one CSV file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in notes().items():
        write_csv(folder / f"{split}.csv", rows)
    return folder


def write_llama(folder: Path, hidden: int = 64, seed: int = 0) -> Path:
    """Write a Llama of two layers with its byte-level tokenizer.

    Args:
        folder: where to.
        hidden: width; NF4 works on blocks of 64.
        seed: of the random weights.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Bytes, and merges enough for the template to be a few dozen tokens.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["transcription"] for rows in notes().values() for row in rows]
    bpe.train_from_iterator([_TEMPLATE, *texts, *SPECIALTIES * 9], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Far wider than a real model's, so that random features of different notes differ.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomise_adapter(model: nn.Module, seed: int = 1) -> None:
    """Give an adapter weights that change something; a new one is the identity."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)


def make_datamodule(**settings: Any) -> TranscriptionDataModule:  # noqa: ANN401 - the datamodule's own
    """A datamodule; a group of settings may be a dict, as in a YAML."""
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.settings import Batching, Columns, Labels, Predict, Split, Tokenizer

    groups: dict[str, Any] = {
        "columns": Columns,
        "labels": Labels,
        "split": Split,
        "batching": Batching,
        "predict": Predict,
    }
    tokenizer = Tokenizer(**settings.pop("tokenizer", {}))
    built = {name: groups[name](**value) if isinstance(value, dict) else value for name, value in settings.items()}
    data = TranscriptionDataModule(**built)
    data.tokenizer = tokenizer
    return data


def tiny_datamodule(notes_folder: Path, llama: Path, /, **settings: Any) -> TranscriptionDataModule:  # noqa: ANN401
    """A datamodule of the forty notes with the tiny model's tokenizer; settings override, group by group."""
    tiny: dict[str, Any] = {
        "source": str(notes_folder),
        "max_response_tokens": 16,
        "batching": {"global_batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 4},
        "tokenizer": {"base_model": str(llama), "max_length": 256},
    }
    for name, value in settings.items():
        tiny[name] = {**tiny.get(name, {}), **value} if isinstance(value, dict) else value
    return make_datamodule(**tiny)


class AtOnce:
    """A timer that does not wait: every stage is a slow one."""

    def __init__(self, seconds: float, say: Callable[[str], None], words: list[str]) -> None:
        self.start = partial(say, *words)

    def cancel(self) -> None:
        """The stage is over."""


class Terminal(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True
