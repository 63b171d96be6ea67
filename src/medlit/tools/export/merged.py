"""An adapter added to weights: ordinary 16-bit safetensors, written shard by shard.

What it is added to matters more than how. An adapter that was trained beside 4-bit weights makes up for their errors;
added to the 16-bit weights that these were made of, it answers otherwise (8 of 50 notes, with the quickstart's 135M
Llama). So by default an adapter is added to the weights that it was trained beside: the very 4-bit ones, unpacked.
`--onto original` takes the 16-bit ones.

The sum is made in float32 and rounded to 16 bits once. Beside the loaded model, or in place of it, memory holds one
shard: 2 GB when unpacked, as large as the publisher's own otherwise.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medlit.atomic_io import read_json, write_json
from medlit.base_model import missing, resolve
from medlit.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's names before the model's own
_INDEX = "model.safetensors.index.json"
_FILES = ["*.json", "*.safetensors"]
# The same weights again, named as their publisher's own code has it.
_TWICE = ["consolidated*.safetensors", "original/*"]
_SHARD = 2 * 10**9  # bytes
Named = Iterable[tuple[str, Tensor]]


def model_folder(base_model: str, revision: str | None) -> Path:
    """The folder of a base model with safetensors, from the Hub's cache or the Hub where it is no folder.

    Raises:
        UserError: there is no such model, or it holds other files.
    """
    where = resolve(base_model)
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(where, revision=revision, allow_patterns=_FILES, ignore_patterns=_TWICE))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise missing(base_model, revision) from error
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"base: {base_model} holds no safetensors, which a merge reads; save it anew.")
    return folder


def original_shards(folder: Path) -> Iterator[Named]:
    """Yield the weights of each file of a model folder.

    Raises:
        UserError: the weights are quantised, or some are not there.
    """
    from safetensors import safe_open

    if "quantization_config" in read_json(folder / "config.json"):
        raise UserError(
            "onto: the base model's own weights are quantised; name 16-bit ones with --base, or leave --onto out."
        )
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            yield [(name, file.get_tensor(name)) for name in file.keys()]


def _shards(folder: Path) -> list[Path]:
    """The files that transformers loads; others beside them may hold the same weights by other names.

    Raises:
        UserError: one is not there.
    """
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.is_file():  # transformers asks for it before the index
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    named = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    absent = [path.name for path in named if not path.is_file()]
    if absent:
        raise UserError(
            f"base: {len(absent)} of the {len(named)} files of weights that {index} names are not there, such as"
            f" {absent[0]}; download or copy that model anew."
        )
    return named


def trained_shards(inner: nn.Module) -> Iterator[Named]:
    """Yield the weights that the adapter was trained beside, unpacked, on the host, some 2 GB at a time.

    Args:
        inner: transformers' model inside PEFT's wrapper.
    """
    from bitsandbytes.functional import dequantize_4bit

    part: list[tuple[str, Tensor]] = []
    for name, value in inner.named_parameters():  # what is tied comes once
        if ".lora_" in name:
            continue
        state = getattr(value, "quant_state", None)
        whole = value.data if state is None else dequantize_4bit(value.data, state)
        part.append((name.replace(".base_layer.", "."), whole.cpu()))
        if sum(2 * tensor.numel() for _, tensor in part) >= _SHARD:
            yield part
            part = []
    if part:
        yield part


def write_merged(shards: Iterable[Named], model: Path, adapter: Path, folder: Path) -> None:
    """Write base model and adapter as one model; the tokenizer is the adapter's.

    Args:
        shards: the weights to add to.
        model: folder of a model of that shape, for its config.
        adapter: a PEFT folder.
        folder: where to, an existing folder.

    Raises:
        UserError: the adapter is of a kind that cannot be added, or has weights without a place in the base model.
    """
    from safetensors.torch import save_file

    updates = Updates(adapter)
    files: list[tuple[Path, list[str]]] = []
    total, dtype = 0, torch.bfloat16
    for shard in shards:
        weights = {name: updates.applied(name, value) for name, value in shard}
        dtype = next((value.dtype for value in weights.values() if value.dtype == torch.float16), dtype)
        total += sum(value.numel() * value.element_size() for value in weights.values())
        files.append((folder / f".{len(files)}.safetensors", list(weights)))
        save_file(weights, files[-1][0], metadata={"format": "pt"})
    if updates.left:
        raise UserError(
            f"to: {len(updates.left)} of the adapter's weights, such as {min(updates.left)}, have no place in the base"
            " model; it is another model, or names its layers otherwise."
        )
    index: dict[str, str] = {}
    for place, (file, keys) in enumerate(files, start=1):
        name = f"model-{place:05}-of-{len(files):05}.safetensors" if files[1:] else "model.safetensors"
        file.rename(folder / name)
        index |= dict.fromkeys(keys, name)
    if files[1:]:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", folder / "generation_config.json")
    config = read_json(model / "config.json")
    for name in ("quantization_config", "torch_dtype", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


class Updates:
    """What an adapter adds to each weight of its base model.

    Args:
        adapter: a PEFT folder.

    Attributes:
        left: names of the adapter's weights that no base weight has asked for yet.

    Raises:
        UserError: the adapter is not plain LoRA.
    """

    def __init__(self, adapter: Path) -> None:
        from peft import LoraConfig
        from safetensors.torch import load_file

        config = LoraConfig.from_pretrained(str(adapter))
        if config.use_dora or config.rank_pattern or config.alpha_pattern or config.fan_in_fan_out:
            raise UserError("to: the adapter is of a kind that medlit does not train and cannot add to weights.")
        self.scale = _scale(config)
        weights = load_file(adapter / ADAPTER_WEIGHTS)
        self._weights = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
        self.left = set(self._weights)

    def applied(self, key: str, weight: Tensor) -> Tensor:
        """A base weight with what the adapter adds to it, in 16 bits.

        Raises:
            UserError: the shapes do not fit.
        """
        dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
        if key in self._weights:  # a bias, which is trained as a whole
            weight = self._taken(key)
        module, _, kind = key.rpartition(".")
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if kind == "weight" and down in self._weights:
            added = self.scale * self._taken(up).float() @ self._taken(down).float()
            if added.shape != weight.shape:
                raise UserError(f"to: the adapter does not fit {key} of the base model; it is another model.")
            weight = weight.float() + added
        return weight.to(dtype).contiguous()

    def _taken(self, key: str) -> Tensor:
        self.left.discard(key)
        return self._weights[key]


def _scale(config: LoraConfig) -> float:
    """What the product of the two matrices is multiplied by."""
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
