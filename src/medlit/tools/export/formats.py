"""What an export writes besides an adapter: a merged model for transformers, and a merged Llama as a GGUF file.

An adapter that was trained on 4-bit weights compensates for their errors; on the original 16-bit weights it answers
differently (8 of 50 notes with the quickstart's 135M Llama). So it is merged into the dequantised 4-bit weights. The
sum is computed in float32 and rounded to 16 bits once.

PyPI has llama.cpp's GGUF writer (the package `gguf`) but not its converter, so Llama's conversion is here: names from
llama.cpp's own map, attention rows in its order, the tokenizer's vocabulary and merges. F16 and Q8_0 are written
directly, K-quants by llama.cpp itself if llama-cpp-python is installed. Memory holds one tensor at a time.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub import split_state_dict_into_shards_factory
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from medlit.atomic_io import read_json, write_json
from medlit.base_model import read_config, resolve
from medlit.errors import UserError
from medlit.model.families import causal_lm, loaded_part, unlike_llama
from medlit.model.language_model import Fp8Linear
from medlit.tools.export.verify import run_worker

SHARD_BYTES = 2 * 10**9  # of memory, besides the loaded model
QUANTISATIONS = ("f16", "q8_0", "q4_k_m")
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


def write_merged(model: nn.Module, base_model: str, revision: str | None, folder: Path) -> None:
    """Write a PEFT model with its adapter merged in as one that transformers loads; without a tokenizer."""
    weights = base_weights(model)
    sizes = {name: 2 * (getattr(each, "quant_state", None) or each).shape.numel() for name, each in weights.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    config = loaded_part(read_config(base_model, revision))
    for file, names in split.filename_to_tensors.items():
        shard = {name: merged_weight(model, name, weights[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        config.dtype = shard[names[0]].dtype
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    config.architectures = [type(causal_lm(model)).__name__]
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)
    with suppress(OSError, ValueError):  # there is none, or one that transformers does not write
        given: dict[str, Any] = {"revision": revision}
        GenerationConfig.from_pretrained(resolve(base_model), **given).save_pretrained(folder)


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a PEFT model's base model as they are loaded, by their names in it; tied weights once."""
    weights = {}
    for name, weight in causal_lm(model).named_parameters():
        if ".lora_" not in name and not name.endswith(".weight_scale"):  # of a weight in FP8, whose bytes are `codes`
            own = f"{name.removesuffix('.codes')}.weight" if name.endswith(".codes") else name
            weights[own.replace(".base_layer.", ".")] = weight
    return weights


def merged_weight(model: nn.Module, name: str, loaded: Tensor) -> Tensor:
    """One of them in 16 bits, with its adapter merged in; the model is in inference mode."""
    owner, _, kind = name.rpartition(".")
    layer, quant_state = causal_lm(model).get_submodule(owner), getattr(loaded, "quant_state", None)
    if isinstance(base := getattr(layer, "base_layer", layer), Fp8Linear) and kind == "weight":
        loaded = base.weight
    weight = (loaded.data if quant_state is None else dequantize_4bit(loaded.data, quant_state)).cpu()
    dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    if isinstance(layer, LoraLayer) and kind == "weight":
        weight = _merged(weight.float(), layer)
    if quant_state is not None and getattr(base, "source_cls", None) is Conv1D:
        weight = weight.t()  # GPT-2 stores inputs by outputs, which 4-bit layers turn round
    return weight.to(dtype).contiguous()


def _merged(weight: Tensor, layer: Any) -> Tensor:  # noqa: ANN401 - PEFT's LoRA layer
    """A frozen weight with its adapter, in float32; DoRA gives what leads to each output its trained norm."""
    weight = weight + layer.get_delta_weight("default").detach().float().cpu()
    if "default" in layer.lora_magnitude_vector:
        inputs = 0 if getattr(layer, "fan_in_fan_out", False) else 1  # GPT-2 stores inputs by outputs
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().cpu().float().unsqueeze(inputs)
        weight = magnitude / torch.linalg.norm(weight, dim=inputs, keepdim=True) * weight
    return weight


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed, with its one requirement that medlit does not share."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "diskcache"))


def check_convertible(base_model: str, revision: str | None, quantisations: list[str]) -> None:
    """Check that a base model can be written in these formats."""
    if why := unlike_llama(read_config(base_model, revision)):
        raise _unproven(why)
    where, optional = resolve(base_model), {"_raise_exceptions_for_missing_entries": False}
    if (tokenizer := cached_file(where, "tokenizer.json", revision=revision, **optional)) is None:
        raise _unproven("this one has no tokenizer.json")
    _pre_tokenizer(read_json(Path(tokenizer)))
    if "q4_k_m" in quantisations and not has_llama_cpp():
        raise UserError(f"gguf_types: q4_k_m needs llama.cpp, which is not installed; run {INSTALL}, or leave it out.")


def _unproven(why: str) -> UserError:
    return UserError(
        f"to: medlit's GGUF is proven for Llama 3 and SmolLM models and {why}; export it with --to merged, and run"
        " llama.cpp's convert_hf_to_gguf.py on that folder."
    )


def write_gguf(model: Path, path: Path, quantisation: str) -> None:
    """Write a folder with a merged model and its tokenizer as one GGUF file."""
    if quantisation == "q4_k_m":  # by llama.cpp, from a temporary 16-bit file
        full = path.with_suffix(".f16")
        write_gguf(model, full, "f16")
        try:
            run_worker({"loader": "quantise", "full": str(full), "path": str(path)})
        except RuntimeError as error:
            message = f"gguf_types: llama.cpp could not quantise this model to q4_k_m ({error}); leave it out."
            raise UserError(message) from error
        full.unlink()
        return
    config: Any = LlamaConfig.from_pretrained(model)
    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, config)
    _add_tokenizer(writer, model, config.vocab_size)
    matrix_type = gguf.GGMLQuantizationType[quantisation.upper()]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantisation.upper()}"])
    writer.add_quantization_version(2)
    for name, tensor in _tensors(model, config):
        stored_type = matrix_type if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored_type)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model, config):
        writer.write_tensor_data(gguf.quantize(tensor, matrix_type) if tensor.ndim > 1 else tensor)
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:  # noqa: ANN401 - a LlamaConfig
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add_width in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add_width(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> None:
    file = read_json(model / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    token_of = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    types = dict.fromkeys(range(vocab_size), gguf.TokenType.UNUSED) | dict.fromkeys(token_of, gguf.TokenType.NORMAL)
    for entry in file["added_tokens"]:
        types[entry["id"]] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(file))
    writer.add_token_list([token_of.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([types[i] for i in range(vocab_size)])
    special = gguf.SpecialVocab(model, load_merges=True, special_token_types=("bos", "eos", "pad"))
    special.add_special_token = {"bos": tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]}
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(file: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer."""
    steps = file.get("pre_tokenizer") or {}
    first = (steps.get("pretokenizers") or [steps])[0]
    pattern = first.get("pattern", {}).get("Regex") or first.get("type")
    name, kind = _PRE_TOKENIZERS.get(pattern), file["model"]
    # With this name llama.cpp takes each word of the vocabulary whole; GPT-4's kind has the same pattern and merges.
    if kind["type"] != "BPE" or name is None or (name == "llama-bpe" and not kind.get("ignore_merges")):
        raise _unproven("this one has another tokenizer")
    return name


def _tensors(model: Path, config: Any) -> Iterator[tuple[str, np.ndarray]]:  # noqa: ANN401 - a LlamaConfig
    """Yield llama.cpp's names and float32 tensors, rows in its order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    rotary_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():
                name = names.get_name(key, (".weight", ".bias"))
                if name is None:
                    raise _unproven(f"this one has the unknown weight {key}")
                tensor = file.get_tensor(key).float().numpy()
                if (projection := key.split(".")[-2]) in rotary_heads:
                    # llama.cpp has rotary pairs side by side, transformers a head's second half behind its first.
                    halves = tensor.reshape(rotary_heads[projection], 2, -1, *tensor.shape[1:])
                    tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
                yield name, tensor
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def rope_factors(config: Any) -> np.ndarray | None:  # noqa: ANN401 - a LlamaConfig
    """What Llama 3.1 divides the rotary frequencies by, float32, (head_dim / 2,); None for plain frequencies."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    factors: np.ndarray = plain / divided.numpy()
    return factors.astype(np.float32)
