"""A merged Llama as a GGUF file, for llama.cpp and what is built on it.

PyPI has llama.cpp's GGUF writer (the package `gguf`) but not its converter, so the conversion of the one architecture
that the recipe's base models have is here: names by llama.cpp's own map, attention's rows in its order, the tokenizer's
vocabulary and merges. F16 and Q8_0 are written directly; K-quants by llama.cpp itself, where llama-cpp-python is
installed. One tensor is in memory at a time.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlit.atomic_io import read_json
from medlit.errors import UserError
from medlit.tools.export.process import ProcessFailed, own_process

Quantisation = Literal["f16", "q8_0", "q4_k_m"]
QUANTISATIONS = ("f16", "q8_0", "q4_k_m")
# The requirements of the extra `gguf`.
INSTALL = (
    '\'pip install --no-deps "llama-cpp-python>=0.3.30,<0.4" "diskcache>=5.6,<6"\' (where there is no wheel it compiles'
    " for minutes and wants cmake and a C++ compiler)"
)
# How a tokenizer cuts text before its merges, by the first pattern in its file; the names are llama.cpp's.
_CUTS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
    "Digits": "smollm",
    "ByteLevel": "gpt-2",
}


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed, with the one requirement that nothing else here has."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "diskcache"))


def check_convertible(model: Path, wanted: list[str]) -> None:
    """Check, before anything is loaded, that a model can be written in the formats that are asked for.

    Args:
        model: a folder with config.json and tokenizer.json.
        wanted: of `QUANTISATIONS`.

    Raises:
        UserError: it cannot.
    """
    config = read_json(model / "config.json")
    if config.get("model_type") != "llama":
        raise UserError(
            f"to: GGUF is written of Llama models and this is {config.get('model_type')!r}; export it with --to merged"
            " and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    if not (model / "tokenizer.json").is_file():
        raise UserError(
            f"to: {model} has no tokenizer.json, from which GGUF's vocabulary is made; export it as merged."
        )
    _cut(read_json(model / "tokenizer.json"))
    if "q4_k_m" in wanted and not has_llama_cpp():
        raise UserError(
            f"gguf_types: q4_k_m is computed by llama.cpp, which is not installed; run {INSTALL}, or leave it out."
        )


def write_gguf(model: Path, path: Path, quantisation: str) -> None:
    """Write a merged model as one GGUF file.

    Args:
        model: a folder with config.json, safetensors and tokenizer.json.
        path: the file.
        quantisation: one of `QUANTISATIONS`.

    Raises:
        UserError: llama.cpp refuses to quantise.
    """
    if quantisation == "q4_k_m":
        full = path.with_suffix(".f16")
        write_gguf(model, full, "f16")
        try:
            _quantise(full, path)
        finally:
            full.unlink()
        return
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    config = read_json(model / "config.json")
    writer = GGUFWriter(path, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, model, config)
    packed = GGMLQuantizationType.Q8_0 if quantisation == "q8_0" else GGMLQuantizationType.F16
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if quantisation == "q8_0" else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(2)
    shapes = {name: tensor.shape for name, tensor in _tensors(model, config)}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        elif packed == GGMLQuantizationType.F16:
            writer.add_tensor_info(name, shape, np.dtype(np.float16), 2 * math.prod(shape))
        else:
            stored = quants.quant_shape_to_byte_shape(shape, packed)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model, config):
        writer.write_tensor_data(tensor if tensor.ndim == 1 else quants.quantize(tensor, packed))
    writer.close()


def _quantise(full: Path, path: Path) -> None:
    try:
        own_process("quantise.py", {"full": str(full), "path": str(path)})
    except ProcessFailed as error:
        raise UserError(
            f"gguf_types: llama.cpp could not quantise this model to q4_k_m ({error}); leave it out."
        ) from error


def _add_shape(writer: Any, config: dict[str, Any]) -> None:  # noqa: ANN401 - gguf is imported late
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding's settings, whichever of transformers' two spellings a config has."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:  # noqa: ANN401
    from gguf import TokenType
    from transformers import AutoTokenizer

    file = read_json(model / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = {entry["id"] for entry in file["added_tokens"] if entry["special"]}
    added = {entry["id"] for entry in file["added_tokens"]}
    named = {place: token for token, place in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for place in range(config["vocab_size"]):
        tokens.append(named.get(place, f"[PAD{place}]"))
        unused = place not in named
        kind = TokenType.CONTROL if place in special else TokenType.USER_DEFINED if place in added else TokenType.NORMAL
        kinds.append(TokenType.UNUSED if unused else kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(file))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = file["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_add_bos_token(tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id])
    for name in ("bos", "eos", "pad"):
        place = getattr(tokenizer, f"{name}_token_id")
        if place is not None:
            getattr(writer, f"add_{name}_token_id")(place)


def _cut(file: dict[str, Any]) -> str:
    """How a tokenizer cuts text, by llama.cpp's name.

    Raises:
        UserError: it is none of those that are known here.
    """
    steps = file.get("pre_tokenizer") or {}
    first = (steps.get("pretokenizers") or [steps])[0]
    pattern = first.get("pattern", {}).get("Regex") or first.get("type")
    if file["model"]["type"] != "BPE" or pattern not in _CUTS:
        raise UserError(
            "to: GGUF is written of models with Llama 3's or SmolLM's kind of tokenizer, and this is another; export it"
            " with --to merged and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    return _CUTS[pattern]


def _tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield llama.cpp's names with float32 tensors in its order of rows."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    turned = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key).float().numpy()
                of = turned.get(key.split(".")[-2])
                name = names.get_name(key, (".weight", ".bias"))
                if name is None:
                    raise UserError(f"to: GGUF has no name for the weight {key}; export it with --to merged.")
                yield name, tensor if of is None else _turned(tensor, of)
    if (factors := _rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def _turned(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp wants them: transformers has a head's two halves behind each other."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What Llama 3.1 divides the rotary frequencies by, float32, (head width / 2,); None for plain ones."""
    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    factors: np.ndarray = 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
    return factors.astype(np.float32)
