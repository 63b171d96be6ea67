"""Tokenizers and a language model small enough for a test: made in memory, nothing downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"
SPECIAL = [PAD, BOS, EOS, TURN]


def _wrap(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerBase:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerBase:
    """One token a byte, behind four special tokens, as GPT-2's and Llama 3's kind begin."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return _wrap(tokenizer, bos)


def spacing_tokenizer() -> PreTrainedTokenizerBase:
    """One token a character, and a space before a text's first word, as Llama 2's kind does."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _wrap(tokenizer, bos=True)


def save_tiny_llama(folder: Path, scale: float = 1.0) -> Path:
    """Save a 2-layer Llama with random weights and the byte tokenizer as `save_pretrained` does.

    Args:
        folder: where to.
        scale: factor on the head's weights; a large one makes the choice between two tokens never a close one.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(scale * 20 if "lm_head" in name else 5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, SPECIAL.index(TURN)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
