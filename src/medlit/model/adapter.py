"""An adapter folder in PEFT's format: written, found, and loaded into a model with an adapter of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from medlit.atomic_io import write_json
from medlit.errors import UserError
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, metadata: AdapterMetadata, folder: Path) -> None:
    """Write adapter, tokenizer and metadata into an existing folder, naming the base model as the user did."""
    config = model.peft_config["default"]
    loaded_from = config.base_model_name_or_path, config.revision
    config.base_model_name_or_path, config.revision = metadata.base_model, metadata.revision
    try:
        # The embedding is never trained here; without this PEFT asks the Hub whether the vocabulary grew.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path, config.revision = loaded_from
    # PEFT's own card names the folder that the weights were loaded from.
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / METADATA_FILE, metadata.to_dict())


def adapter_folder(adapter: str) -> Path:
    """A local folder with an adapter: the one named, or a Hub repository's in the cache.

    Raises:
        UserError: there is no adapter there.
    """
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
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.adapter: {adapter} holds no adapter_config.json; give a folder that medlit or PEFT wrote."
        )
    return folder


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Read an adapter's weights into a model that has an adapter of the same shape.

    Raises:
        UserError: the file is missing, broken, or holds other weights than the model has.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.adapter: {file} is missing or broken; copy the adapter's folder again.") from error
    if any(not bool(value.isfinite().all()) for value in weights.values()):
        raise UserError(f"model.adapter: {file} holds weights that are not finite numbers; take another adapter.")
    try:
        result: Any = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"model.adapter: the weights in {file} do not fit the base model's layers.") from error
    absent = [key for key in result.missing_keys if "lora_" in key]
    if absent or result.unexpected_keys:
        raise UserError(
            f"model.adapter: {file} does not fit: {len(absent)} weights are missing and {len(result.unexpected_keys)}"
            " have no place in this base model."
        )
