"""An adapter folder in PEFT's format: written, found, and loaded into a model with an adapter of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medlit.atomic_io import write_json
from medlit.base_model import hub_id, is_same_model
from medlit.errors import UserError
from medlit.model.adapter_metadata import METADATA_FILE, PEFT_FILE, AdapterMetadata, read_peft_config
from medlit.model.families import name_in_base, targets_in_base
from medlit.model.language_model import trainable_names
from medlit.model.settings import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, metadata: AdapterMetadata, folder: Path) -> None:
    """Write adapter, tokenizer and metadata into an existing folder, for the base model as PEFT alone loads it."""
    config = model.peft_config["default"]
    local = Path(metadata.base_model).expanduser()  # PEFT is to find it from any working folder
    name = str(local.absolute()) if (local / "config.json").is_file() else hub_id(metadata.base_model)
    base = {"base_model_name_or_path": name, "revision": metadata.revision}
    written = base | (targets := targets_in_base(model))
    loaded = {name: getattr(config, name) for name in written}
    vars(config).update(written)
    try:
        # The embedding is never trained here; without this PEFT asks the Hub whether the vocabulary grew.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    finally:
        vars(config).update(loaded)
    if targets:
        weights = {name_in_base(model, name): value for name, value in load_file(folder / WEIGHTS_FILE).items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # PEFT's own card names the folder that the weights were loaded from.
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / METADATA_FILE, metadata.to_dict())


def adapter_folder(adapter: str) -> Path:
    """A local folder with an adapter: the one named, or a Hub repository's; a UserError if there is none."""
    folder = Path(adapter).expanduser()
    if not folder.exists() and adapter.count("/") == 1 and not adapter.startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(adapter))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"model.adapter: {adapter} is neither a folder nor available from the Hub; check the name."
            ) from error
    if not (folder / PEFT_FILE).is_file():
        raise UserError(f"model.adapter: {adapter} holds no adapter_config.json; give a folder of medlit or PEFT.")
    if (pickle := folder / "adapter_model.bin").is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"model.adapter: {pickle} may hold code beside weights; let PEFT save it as safetensors.")
    return folder


def adapter_settings(folder: Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """Base model, its revision, and the structural LoRA settings that an adapter was trained with."""
    config, lora = read_peft_config(folder / PEFT_FILE)
    if (folder / METADATA_FILE).is_file():
        metadata = AdapterMetadata.read(folder / METADATA_FILE)
        return metadata.base_model, metadata.revision, metadata.lora
    base, revision = (str(config.get(name) or "") or None for name in ("base_model_name_or_path", "revision"))
    return base, revision, lora.structure()


def read_metadata(folder: Path, base_model: str) -> AdapterMetadata | None:
    """What medlit recorded of an adapter; None if another program wrote it, a UserError if for another base model."""
    if (folder / METADATA_FILE).is_file():
        return AdapterMetadata.read(folder / METADATA_FILE)
    theirs, _, _ = adapter_settings(folder)
    if theirs and not is_same_model(base_model, theirs):
        raise UserError(
            f"model.language_model.base_model: the adapter {folder} belongs to {theirs!r} and the config says"
            f" {base_model!r}; set it to the former, or, if both are one model, write its name into"
            f" base_model_name_or_path of {PEFT_FILE}."
        )
    return None


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Read an adapter's weights into a model that has one of the same shape; a UserError if they do not fit it."""
    from peft import set_peft_model_state_dict

    file = folder / WEIGHTS_FILE
    try:
        weights = {name_in_base(model, name, back=True): value for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.adapter: {file} is missing or broken; copy the adapter's folder again.") from error
    if any(not bool(value.isfinite().all()) for value in weights.values()):
        raise UserError(f"model.adapter: {file} holds weights that are not finite numbers; take another adapter.")
    ours = Lora.from_peft(model.peft_config["default"].to_dict()).structure()
    theirs = read_peft_config(folder / PEFT_FILE)[1].structure()
    for name in ("r", "alpha", "rslora", "dora", "bias", "rank_pattern", "alpha_pattern"):
        if ours[name] != theirs[name]:
            raise UserError(
                f"model.lora.{name}: model.adapter: {folder} does not fit, since it was trained with {theirs[name]!r}"
                f" and the config says {ours[name]!r}; set it to the former."
            )
    try:
        result: Any = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"model.adapter: the weights in {file} do not fit the base model's layers.") from error
    absent = trainable_names(model).intersection(result.missing_keys)
    if absent or result.unexpected_keys:
        raise UserError(
            f"model.adapter: {file} does not fit: {len(absent)} weights are missing and {len(result.unexpected_keys)}"
            " have no place in this base model."
        )
