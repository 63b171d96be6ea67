"""A merged Llama as a GGUF file, for llama.cpp and everything built on it.

PyPI has llama.cpp's GGUF writer (the package `gguf`) but not its converter, so Llama's conversion is here: names from
llama.cpp's own map, attention rows in its order, the tokenizer's vocabulary and merges. F16 and Q8_0 are written
directly, K-quants by llama.cpp itself if llama-cpp-python is installed. Memory holds one tensor at a time.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medlit.atomic_io import read_json
from medlit.errors import UserError
from medlit.tools.export.verify import WorkerFailed, run_worker

QUANTISATIONS = ("f16", "q8_0", "q4_k_m")
# The requirements of the extra `gguf`.
INSTALL = (
    '\'pip install --no-deps "llama-cpp-python>=0.3.30,<0.4" "diskcache>=5.6,<6"\' (where there is no wheel, it'
    " compiles for minutes and needs cmake and a C++ compiler)"
)
# llama.cpp's name of a pre-tokenizer, by the first pattern in tokenizer.json.
_PRE_TOKENIZERS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
    "Digits": "smollm",
    "ByteLevel": "gpt-2",
}


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed, with its one requirement that medlit does not share."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "diskcache"))


def check_convertible(model: Path, quantisations: list[str]) -> None:
    """Check that the model of a folder can be written in these formats.

    Raises:
        UserError: it cannot.
    """
    model_type = read_json(model / "config.json").get("model_type")
    if model_type != "llama":
        raise UserError(
            f"to: GGUF supports Llama models only and this is {model_type!r}; export it with --to merged and convert it"
            " with llama.cpp's convert_hf_to_gguf.py."
        )
    if not (model / "tokenizer.json").is_file():
        raise UserError(f"to: {model} has no tokenizer.json, which GGUF's vocabulary comes from; use --to merged.")
    _pre_tokenizer(read_json(model / "tokenizer.json"))
    if "q4_k_m" in quantisations and not has_llama_cpp():
        raise UserError(
            f"gguf_types: q4_k_m is computed by llama.cpp, which is not installed; run {INSTALL}, or leave it out."
        )


def write_gguf(model: Path, path: Path, quantisation: str) -> None:
    """Write a folder with a merged model and its tokenizer as one GGUF file.

    Raises:
        UserError: a weight has no place in GGUF, or llama.cpp cannot quantise the model.
    """
    if quantisation == "q4_k_m":
        _write_q4_k_m(model, path)
        return
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    config = read_json(model / "config.json")
    writer = GGUFWriter(path, "llama")
    _add_hyperparameters(writer, config)
    _add_tokenizer(writer, model, config)
    matrix_type = GGMLQuantizationType[quantisation.upper()]
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quantisation.upper()}"])
    writer.add_quantization_version(2)
    for name, tensor in _tensors(model, config):
        stored_type = matrix_type if tensor.ndim > 1 else GGMLQuantizationType.F32
        shape = quants.quant_shape_to_byte_shape(tensor.shape, stored_type)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model, config):
        writer.write_tensor_data(quants.quantize(tensor, matrix_type) if tensor.ndim > 1 else tensor)
    writer.close()


def _write_q4_k_m(model: Path, path: Path) -> None:
    """Quantise with llama.cpp, from a temporary 16-bit file."""
    full = path.with_suffix(".f16")
    write_gguf(model, full, "f16")
    try:
        run_worker({"loader": "quantise", "full": str(full), "path": str(path)})
    except WorkerFailed as error:
        raise UserError(
            f"gguf_types: llama.cpp could not quantise this model to q4_k_m ({error}); leave it out."
        ) from error
    finally:
        full.unlink()


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:  # noqa: ANN401 - gguf is imported late
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, in either of transformers' two spellings."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:  # noqa: ANN401
    from gguf import TokenType
    from transformers import AutoTokenizer

    file = read_json(model / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    types = dict.fromkeys(tokenizer.get_vocab().values(), TokenType.NORMAL)
    for entry in file["added_tokens"]:
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    token_of = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(file))
    writer.add_token_list([token_of.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([types[i] if i in token_of else TokenType.UNUSED for i in ids])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]])
    writer.add_add_bos_token(tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id])
    for name in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)


def _pre_tokenizer(file: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer."""
    steps = file.get("pre_tokenizer") or {}
    first = (steps.get("pretokenizers") or [steps])[0]
    pattern = first.get("pattern", {}).get("Regex") or first.get("type")
    if file["model"]["type"] != "BPE" or pattern not in _PRE_TOKENIZERS:
        raise UserError(
            "to: GGUF supports tokenizers like Llama 3's and SmolLM's and this is another kind; export it with --to"
            " merged and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    return _PRE_TOKENIZERS[pattern]


def _tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield llama.cpp's names and float32 tensors, rows in its order."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    rotary_heads = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():
                name = names.get_name(key, (".weight", ".bias"))
                if name is None:
                    raise UserError(f"to: GGUF has no name for the weight {key}; export it with --to merged.")
                tensor = file.get_tensor(key).float().numpy()
                projection = key.split(".")[-2]
                if projection in rotary_heads:
                    tensor = _interleave_rotary_halves(tensor, rotary_heads[projection])
                yield name, tensor
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def _interleave_rotary_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Put rotary pairs side by side as llama.cpp expects; transformers has a head's second half behind its first."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What Llama 3.1 divides the rotary frequencies by, float32, (head_dim / 2,); None for plain frequencies."""
    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width = _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clip(0, 1)
    factors: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return factors.astype(np.float32)
