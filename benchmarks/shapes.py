"""What benchmarks and GPU tests stand on: an 8B Llama with random weights, and notes as long as real ones.

    python benchmarks/shapes.py FOLDER     write the weights (bf16, 16 GB), on a GPU

`LLAMA_TOKENIZER` names a folder with Llama 3.1's tokenizer.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Real notes: median 683 tokens of prompt and answer, 4 % at the cut, mean 779.
MEDIAN, SIGMA, CUT = 6.5265, 0.57, 1800  # of the logarithm, of the logarithm, tokens


def write_llama_8b(folder: Path) -> Path:
    """Write the weights and the tokenizer; returns the folder.

    What a layer adds to the residual stream is scaled by 1 / sqrt(2 x layers), as GPT-2 begins (Radford 2019), and the
    embedding is of size 1. With every matrix alike, bfloat16 rounding alone is 17 % of the adapter's gradient (measured
    on a narrow model of 32 layers against float32), and no two ways of computing it could be compared; so it is 3 %.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(os.environ["LLAMA_TOKENIZER"]) / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        # A token that the vocabulary has; a new one would run past the embedding.
        pad_token="<|reserved_special_token_250|>",
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.div_(config.initializer_range)
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.div_((2 * config.num_hidden_layers) ** 0.5)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def write_notes(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int, overhead: int, shrink: int = 1) -> Path:
    """Write notes whose prompt and answer have lengths like real ones', one JSONL file a split.

    Args:
        folder: where to.
        tokenizer: whose tokens are counted.
        count: training notes.
        overhead: tokens of prompt and answer around a text.
        shrink: lengths are divided by this.
    """
    from medlit.data.builtin import builtin_notes

    invented = builtin_notes(train=390, validation=13, test=13)
    pool: list[int] = tokenizer(" ".join(row["transcription"] for row in invented["train"]))["input_ids"][1:]
    draw = random.Random(0)
    rows = []
    for i in range(count):
        length = min(CUT, draw.lognormvariate(MEDIAN, SIGMA)) / shrink
        start = draw.randrange(len(pool))
        text = tokenizer.decode((pool + pool)[start : start + max(4, round(length) - overhead)])
        label = invented["train"][i % len(invented["train"])]["medical_specialty"]
        rows.append({"id": f"n{i}", "transcription": f"{i} {text}", "medical_specialty": label})
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in {"train": rows, "validation": invented["validation"], "test": invented["test"]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_llama_8b(Path(sys.argv[1]))
