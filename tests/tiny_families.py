"""Tiny random models of many families, sharpened so that a wrong scale, cap, window or state shows in the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medlit.data.collate import Batch, Prompts

VOCABULARY, WINDOW = 320, 8
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "eos_token_id": 2}
# Family -> its configuration where it differs; the comment says what it stands for.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {},  # a window in every layer
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},  # windows in some layers
    "qwen3": {},
    "gemma2": {**_MIXED, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 16},
    "gemma4_text": {**_MIXED, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},  # scaled logits
    "cohere2": {"logit_scale": 0.3, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "smollm3": {"sliding_window": None},  # a layer without positions
    "phi3": {},  # fused projections
    "gpt_oss": {**_MIXED, **_MOE},  # attention sinks and experts
    "gpt2": _GPT2,  # a body that is not called `model`
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # a body inside the body
    "bloom": {"n_head": 4, "n_layer": 4},  # ALiBi, and a cache with another layout
    "qwen3_next": {  # a running state
        **_MOE,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_mamba": {"state_size": 16},
    "falcon_h1": {  # a scale of the logits that the body keeps
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "llama4_text": {**_MOE, "attention_chunk_size": WINDOW},  # a body that its class calls otherwise, and chunks
}


def tiny_multimodal() -> nn.Module:
    """A Mistral 3: a Mistral in float32 beside a vision tower whose layers have the same names."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

    text = MistralConfig(**{**_COMMON, "sliding_window": None})  # type: ignore[arg-type]
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config=text.to_dict(), vision_config=vision, image_token_index=VOCABULARY - 1)
    torch.manual_seed(0)
    model: nn.Module = Mistral3ForConditionalGeneration(config).float().eval()
    return model


def tiny_gemma3(**text: object) -> nn.Module:
    """A whole Gemma 3 in float32, beside a vision tower with layers of the same names; medlit loads the text part."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    settings = tiny_model("gemma3_text").config.to_dict() | text  # type: ignore[operator, union-attr]
    config = Gemma3Config(text_config=settings, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model: nn.Module = Gemma3ForConditionalGeneration(config).float().eval()
    return model


def tiny_model(family: str) -> nn.Module:
    """A float32 model in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = FAMILIES[family] if family == "gpt2" else {**_COMMON, **FAMILIES[family]}
    fields = CONFIG_MAPPING[family].__dataclass_fields__
    config = CONFIG_MAPPING[family](**{name: value for name, value in settings.items() if name in fields})
    torch.manual_seed(0)
    # As it is loaded: SDPA leaves the soft cap out.
    attention = {"attn_implementation": "eager"} if "attn_logit_softcapping" in settings else {}
    model: nn.Module = AutoModelForCausalLM.from_config(config, **attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.15:
                parameter.normal_(std=0.2)
    return model


def left_padded(prompts: list[list[int]]) -> Prompts:
    """A batch of prompts to answer."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Prompts(ids, mask, list(range(len(prompts))), [""] * len(prompts), [0] * len(prompts))


def right_padded(prompts: list[list[int]], label: list[int]) -> Batch:
    """A batch for the loss: each prompt with the same answer."""
    rows = [prompt + label for prompt in prompts]
    width = max(map(len, rows))
    return Batch(
        torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        torch.tensor([row * width + len(p) - 1 + i for row, p in enumerate(prompts) for i in range(len(label))]),
        torch.tensor(label * len(prompts)),
        [len(row) for row in rows],
        len(label) * len(prompts),
        [""] * len(prompts),
    )
