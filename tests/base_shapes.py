"""Widths of the base models that have a config, and the least memory that a fit on one takes.

Their `config.json` is not here and was not read: the widths are the published ones, written from memory, and give each
model's published number of parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from medlit.model.fit_memory import fit_memory
from medlit.model.memory import GIB
from medlit.model.settings import LanguageModel, Lora

_LLAMA_8B = ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False)
_MISTRAL_7B = ("mistral", 32, 4096, 14336, 32, 8, 128, 32768, False)
_NEMO = ("mistral", 40, 5120, 14336, 32, 8, 128, 131072, False)
_GEMMA_3_4B = ("gemma3", 34, 2560, 10240, 8, 4, 256, 262208, True)
_GEMMA_3_27B = (62, 5376, 21504, 32, 16, 128)
# Config -> model_type as loaded, layers, hidden, inner, heads, key heads, head width, tokens, whether the head is tied.
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama31_8b": _LLAMA_8B,
    "llama31_8b_base": _LLAMA_8B,
    "llama31_70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, False),
    "llama31_405b": ("llama", 126, 16384, 53248, 128, 8, 128, 128256, False),
    "llama32_1b": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama32_3b": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "mistral_7b": _MISTRAL_7B,
    "mistral_7b_instruct": _MISTRAL_7B,
    "mistral_nemo_base": _NEMO,
    "mistral_nemo_instruct": _NEMO,
    "mistral_small": ("mistral", 40, 5120, 32768, 32, 8, 128, 131072, False),
    "phi35_mini": ("llama", 32, 3072, 8192, 32, 32, 96, 32064, False),
    "phi3_medium": ("mistral", 40, 5120, 17920, 40, 10, 128, 32064, False),
    "phi4": ("llama", 40, 5120, 17920, 40, 10, 128, 100352, False),
    "gemma2_9b": ("gemma2", 42, 3584, 14336, 16, 8, 256, 256000, True),
    "gemma2_27b": ("gemma2", 46, 4608, 36864, 32, 16, 128, 256000, True),
    "gemma3_1b": ("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, True),
    "gemma3_4b": _GEMMA_3_4B,
    "gemma3_27b": ("gemma3", *_GEMMA_3_27B, 262208, True),
    "medgemma_4b": _GEMMA_3_4B,
    "medgemma_27b": ("gemma3_text", *_GEMMA_3_27B, 262144, True),
    "qwen25_7b": ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False),
    "qwen3_600m": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3_4b": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3_8b": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "qwen3_14b": ("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False),
    "smollm2_135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "smollm3_3b": ("smollm3", 36, 2048, 11008, 16, 4, 128, 128256, True),
}
_NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NOTE = 2048  # tokens, the longest that the recipe allows
# As `LlamaConfig` takes it.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def base_config(name: str) -> Any:  # noqa: ANN401 - transformers' configurations share no typed base
    """The transformers configuration of a config's base model; nested where its repository's is."""
    from transformers import CONFIG_MAPPING

    family, *widths, tied = SHAPES[name]
    values = dict(zip((*_NAMES, "head_dim", "vocab_size"), widths, strict=True))
    values |= {"tie_word_embeddings": tied, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return CONFIG_MAPPING[family](text_config=values) if family == "gemma3" else CONFIG_MAPPING[family](**values)


def least_gib(name: str, *, load_in_4bit: bool) -> float:
    """GiB of GPU memory for one note of the greatest length at a time, all layers recomputed."""
    language_model = LanguageModel(gradient_checkpointing="unsloth", load_in_4bit=load_in_4bit, offload="none")
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    return fit_memory(base_config(name), language_model, Lora(), NOTE, NOTE, gpu, dtype).total / GIB
