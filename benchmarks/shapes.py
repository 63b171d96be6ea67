"""Base models of real shapes with random weights and notes of real lengths, for benchmarks and GPU tests.

    python benchmarks/shapes.py FOLDER            write a Llama 3.1 8B's weights (bf16, 16 GB), on a GPU
    python benchmarks/shapes.py FOLDER qwen3_8b   eight layers of another family's

`LLAMA_TOKENIZER` names a folder with Llama 3.1's tokenizer.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Real notes: median 683 tokens of prompt and answer, 4 % at the cut, mean 779.
MEDIAN, SIGMA, CUT = 6.5265, 0.57, 1800  # of the logarithm, of the logarithm, tokens


# Llama 3.1's: width, MLP's width, layers, heads.
LLAMAS = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
# As repositories of 4-bit weights declare it.
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}
# Family -> its widths in tests/base_shapes.py, or the widths; and what else its repository declares.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama31_8b": ("llama31_8b", {}),
    "mistral_7b": ("mistral_7b", {"sliding_window": None}),  # v0.3
    "mistral_nemo": ("mistral_nemo_base", {"sliding_window": None}),
    "phi35_mini": ("phi35_mini", {}),  # as Unsloth stores it
    "phi35_mini_fused": ("phi35_mini", {"model_type": "phi3", "sliding_window": 262144}),  # as Microsoft does
    "gemma2_9b": ("gemma2_9b", {"sliding_window": 4096, "query_pre_attn_scalar": 256}),  # in every other layer
    "gemma3_4b": ("gemma3_4b", {"model_type": "gemma3_text", "sliding_window": 1024}),  # in five of six layers
    "qwen3_8b": ("qwen3_8b", {}),
    "qwen25_7b": ("qwen25_7b", {}),
    "smollm3_3b": ("smollm3_3b", {}),
    "granite_8b": (
        ("granite", 40, 4096, 12800, 32, 8, 128, 49155, True),
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "attention_multiplier": 0.0078125,
            "residual_multiplier": 0.22,
        },
    ),
}
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # what stands in for PROJECTIONS in a Phi-3
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def llama_tokenizer(vocabulary: int = 128256) -> PreTrainedTokenizerFast:
    """Llama 3.1's; without its rarest tokens for a model that has fewer."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    # An existing token to pad with; a new one would exceed the embedding.
    bos, special = "<|begin_of_text|>", {"eos_token": "<|eot_id|>", "pad_token": "<|reserved_special_token_250|>"}
    file = Path(os.environ["LLAMA_TOKENIZER"]) / "tokenizer.json"
    if vocabulary >= 128256:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=bos, **special)
    data = json.loads(file.read_text(encoding="utf-8"))
    bpe, kept = data["model"], vocabulary - len(data["added_tokens"])
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < kept}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    bpe["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= bpe["vocab"].keys()]
    for i, token in enumerate(data["added_tokens"]):
        token["id"] = kept + i
    tokenizer = Tokenizer.from_str(json.dumps(data | {"post_processor": None}))
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, kept)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, **special)


def llama_config(size: str) -> LlamaConfig:
    """The configuration of a Llama 3.1: '8B', '70B' or '405B'."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads = LLAMAS[size]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
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
        bos_token_id=128000,
        eos_token_id=128009,
        pad_token_id=128255,
        dtype="bfloat16",
    )


def family_config(name: str, **changes: Any) -> PreTrainedConfig:  # noqa: ANN401
    """The configuration of eight layers of a family's real width.

    Args:
        name: in `FAMILIES`.
        changes: settings other than the published ones.
    """
    from base_shapes import SHAPES
    from transformers import CONFIG_MAPPING

    shape, declared = FAMILIES[name]
    model_type, _, *widths, tied = SHAPES[shape] if isinstance(shape, str) else shape
    values: dict[str, Any] = {"model_type": model_type, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    values |= {"tie_word_embeddings": tied, "dtype": "bfloat16"} | dict(zip(_WIDTHS, widths, strict=True))
    values |= declared | changes
    config = CONFIG_MAPPING[values.pop("model_type")]
    fields = config.__dataclass_fields__
    return config(**{name: value for name, value in values.items() if name in fields})  # type: ignore[no-any-return]


def write_family(folder: Path, name: str) -> Path:
    """Write eight layers of a family's real width and vocabulary, with a tokenizer; returns the folder."""
    tokenizer = llama_tokenizer(family_config(name).vocab_size)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return write_model(folder, family_config(name, **ids), tokenizer)


def write_tiny_family(folder: Path, name: str) -> Path:
    """Write two narrow layers of a family in float32, with a tiny tokenizer; returns the folder."""
    import torch
    from fakes import write_llama
    from transformers import AutoConfig, AutoModelForCausalLM

    write_llama(folder)
    llama = AutoConfig.from_pretrained(folder)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("head_dim", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    torch.manual_seed(0)
    config = family_config(name, **{field: getattr(llama, field) for field in same}, dtype="float32")
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def write_llama_8b(folder: Path) -> Path:
    """Write the 8B's weights and the tokenizer; returns the folder."""
    return write_model(folder, llama_config("8B"))


def write_model(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write random bfloat16 weights of any model's shape, drawn on the GPU, and a tokenizer; returns the folder.

    Without one the tokenizer is Llama's.

    What a layer adds to the residual stream is scaled by 1 / sqrt(2 x layers), as GPT-2 begins (Radford 2019), and the
    embedding is of size 1 if the head has separate weights. With every matrix alike, bfloat16 rounding alone is 17 %
    of the adapter's gradient (measured on a narrow model of 32 layers against float32), and no two ways of computing it
    could be compared; so it is 3 %.
    """
    import torch
    from transformers import AutoModelForCausalLM

    (tokenizer or llama_tokenizer()).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        if not config.tie_word_embeddings:
            model.get_input_embeddings().weight.div_(config.initializer_range)
        for name, matrix in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                matrix.div_((2 * config.num_hidden_layers) ** 0.5)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def write_llama_4bit(folder: Path, config: LlamaConfig, device: str) -> Path:
    """Write random weights in NF4, a layer at a time, as a repository of 4-bit weights holds them; returns the folder.

    A 70B would take 140 GB before it is quantised; so no more than one of its matrices ever stands there. Sizes of the
    numbers are those of `write_llama_8b`.

    Args:
        folder: where to; exists, with or without a tokenizer.
        config: the model's.
        device: that draws and quantises.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    draw = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}

    def matrix(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw, device=device, dtype=torch.bfloat16) * std

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        # Parts of one tensor may share memory, which the format does not allow.
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    hidden, std = config.hidden_size, config.initializer_range
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (config.intermediate_size, hidden),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(config.num_hidden_layers):
        begin = f"model.layers.{layer}"
        tensors = {f"{begin}.{norm}.weight": ones for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors = {name: value.clone() for name, value in tensors.items()}
        for block, names in PROJECTIONS.items():
            for name in names:
                scale = std / (2 * config.num_hidden_layers) ** 0.5 if name in ("o_proj", "down_proj") else std
                packed, state = quantize_4bit(
                    matrix(*shapes[name], scale), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                key = f"{begin}.{block}.{name}.weight"
                tensors[key] = packed
                tensors |= {f"{key}.{part}": value for part, value in state.as_dict(packed=True).items()}
        save(f"layer-{layer}.safetensors", tensors)
    rest = {"model.norm.weight": ones, "model.embed_tokens.weight": matrix(config.vocab_size, hidden, 1.0)}
    save("rest.safetensors", rest | {"lm_head.weight": matrix(config.vocab_size, hidden, std)})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": NF4}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_notes(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int, overhead: int, shrink: int = 1) -> Path:
    """Write notes whose prompt and answer have lengths like real ones', one JSONL file per split.

    Args:
        folder: where to.
        tokenizer: whose tokens are counted.
        count: training notes.
        overhead: tokens of prompt and answer around a text.
        shrink: lengths are divided by this.
    """
    from builtin_notes import builtin_notes

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
    sys.path += [str(Path(__file__).resolve().parents[1] / part) for part in ("src", "tests")]
    where, *family = sys.argv[1:]
    if family:
        write_family(Path(where), family[0])
    else:
        write_llama_8b(Path(where))
