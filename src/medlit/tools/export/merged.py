"""An adapter merged into the weights that it was trained on: 16-bit safetensors, written shard by shard.

An adapter that was trained on 4-bit weights makes up for their errors; on the 16-bit weights that these were quantised
from it answers differently (8 of 50 notes with the quickstart's 135M Llama). So it is merged into the 4-bit weights
themselves, dequantised. The sum is computed in float32 and rounded to 16 bits once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from medlit.atomic_io import read_json, write_json
from medlit.base_model import missing, resolve
from medlit.model.families import causal_lm

_SHARD_BYTES = 2 * 10**9  # of memory, besides the loaded model


def config_folder(base_model: str, revision: str | None) -> Path:
    """The folder with a base model's JSON files, from the Hub or its cache if it is not local.

    Raises:
        UserError: there is no such model.
    """
    source = resolve(base_model)
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise missing(base_model, revision) from error
    if not (folder / "config.json").is_file():
        raise missing(base_model, revision)
    return folder


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of a PEFT model's base model with its LoRA update added, in 16 bits; tied weights once."""
    from bitsandbytes.functional import dequantize_4bit

    inner = causal_lm(model)
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            continue
        quant_state = getattr(parameter, "quant_state", None)
        weight = parameter.data if quant_state is None else dequantize_4bit(parameter.data, quant_state)
        weight = weight.cpu()
        dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
        if name.endswith(".base_layer.weight"):
            weight = weight.float() + _lora_update(inner.get_submodule(name.removesuffix(".base_layer.weight")))
        yield name.replace(".base_layer.", "."), weight.to(dtype).contiguous()


def _lora_update(layer: nn.Module) -> Tensor:
    """`B @ A * scaling` of PEFT's LoRA layer, in float32."""
    up, down = (getattr(layer, name)["default"].weight.detach().cpu().float() for name in ("lora_B", "lora_A"))
    update: Tensor = up @ down * layer.scaling["default"]  # type: ignore[index, operator]
    return update


def write_merged(weights: Iterable[tuple[str, Tensor]], base: Path, folder: Path) -> None:
    """Write weights, and the config of the folder `base`, as a model that transformers loads; without a tokenizer."""
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    total, dtype = 0, torch.bfloat16
    for shard in _shards(weights):
        if any(value.dtype == torch.float16 for value in shard.values()):
            dtype = torch.float16
        total += sum(value.nbytes for value in shard.values())
        shards.append((folder / f".{len(shards)}.safetensors", list(shard)))
        save_file(shard, shards[-1][0], metadata={"format": "pt"})
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, start=1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    config = read_json(base / "config.json")
    for name in ("quantization_config", "torch_dtype", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def _shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Collect weights into shards."""
    shard: dict[str, Tensor] = {}
    for name, value in weights:
        shard[name] = value
        if sum(each.nbytes for each in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
