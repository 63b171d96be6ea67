"""Free greedy generation. B notes, T prompt tokens, N new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medlit.data.batches import Prompts
from medlit.labels import LabelSet
from medlit.model.backbone import causal_lm
from medlit.model.decoding.answers import Answers


def eos_ids(model: nn.Module, tokenizer: Any) -> list[int]:  # noqa: ANN401 - transformers' tokenizers are untyped
    """Every token that ends an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*several, tokenizer.eos_token_id] if token is not None})


def generate(model: nn.Module, tokenizer: Any, prompts: Prompts, label_set: LabelSet, max_new_tokens: int) -> Answers:  # noqa: ANN401
    """Free greedy generation, each row until an EOS, read by the strict parser.

    Args:
        model: in answer mode.
        tokenizer: the base model's.
        prompts: left-padded, (B, T).
        label_set: the K labels.
        max_new_tokens: most tokens of an answer.
    """
    ends = eos_ids(model, tokenizer)
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # An instruction model's own generation config samples; greedy wants none of that.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )
    new = out[:, prompts.input_ids.shape[1] :].cpu()  # (B, N)
    texts = [
        tokenizer.decode(_until_end(row, ends), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in new.tolist()
    ]
    return Answers(torch.tensor([label_set.parse(text) for text in texts]), texts)


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
