"""Loading the base model through Unsloth, in 4 bit, with a fresh adapter.

Unsloth on a GPU patches the model's classes (fast kernels, a fused loss); on a CPU it is stock transformers and PEFT.
What differs between the two stays here and in `language_model.py`, which is the model at work.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn

from medlit.base_model import missing, resolve
from medlit.errors import UserError
from medlit.model import packing
from medlit.model.checks import check_held, check_loftq, check_room, check_stored, check_targets
from medlit.model.language_model import checkpointing
from medlit.model.precision import dtype_for
from medlit.model.settings import LanguageModel, Lora

# Where Unsloth's own attention call is kept while medlit's stands in its place.
_STOCK = "_medlit_stock_run_attention"
_log = logging.getLogger(__name__)


def load_model(language_model: LanguageModel, lora: Lora | None, device: torch.device) -> nn.Module:
    """Load the base model on a device and give it a fresh adapter.

    Args:
        language_model: what to load.
        lora: the adapter's shape; None leaves the bare base model.
        device: where this process computes.

    Raises:
        UserError: there is no such model, or it or the machine cannot hold it as asked.
    """
    from unsloth import FastLanguageModel  # isort: skip - before transformers
    from transformers import AutoConfig

    if device.type == "cpu" and lora is not None and language_model.dtype == "float16":
        raise UserError("model.language_model.dtype: float16 does not train on a CPU; set it to 'auto'.")
    chatter = io.StringIO()
    where = resolve(language_model.base_model)
    try:
        config = AutoConfig.from_pretrained(where, revision=language_model.revision, trust_remote_code=False)
        check_stored(language_model, config)
        check_room(language_model, config, device)
        # Unsloth prints a banner to standard output, where a prediction may be expected.
        with contextlib.redirect_stdout(chatter):
            model, _ = FastLanguageModel.from_pretrained(
                where,
                revision=language_model.revision,
                # Otherwise Unsloth takes another repository for many a name ('-bnb-4bit' added for 4 bits, cut off for
                # 16) and drops the revision; and for a name that it does not know it asks GitHub for a newer list.
                use_exact_model_name=True,
                max_seq_length=language_model.max_length,
                dtype=dtype_for(device, language_model.dtype),
                load_in_4bit=language_model.load_in_4bit,
                device_map={"": str(device)},
                use_gradient_checkpointing=checkpointing(language_model),
                trust_remote_code=False,
            )
            check_held(model, language_model)
            if lora is not None:
                check_targets(model, lora.target_modules)
                if lora.loftq:
                    check_loftq(model, device)
                model = FastLanguageModel.get_peft_model(
                    model,
                    **lora.as_peft(),
                    init_lora_weights="loftq" if lora.loftq else True,
                    loftq_config={"loftq_bits": 4, "loftq_iter": 1} if lora.loftq else None,
                    use_gradient_checkpointing=checkpointing(language_model),
                    random_state=lora.seed,
                    max_seq_length=language_model.max_length,
                )
    except (SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"model.language_model.base_model: {language_model.base_model} holds weights that are cut short,"
            f" damaged, or mixed with"
            " code; fetch or copy them again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or not _is_missing(error):
            raise
        raise missing(language_model.base_model, language_model.revision) from error
    finally:
        for line in filter(str.strip, chatter.getvalue().splitlines()):
            _log.debug(line)
    if device.type == "cuda":
        _let_pack(model, language_model.max_length)
    return model  # type: ignore[no-any-return]


def _let_pack(model: nn.Module, max_length: int) -> None:
    """Teach Unsloth's Llama attention to take packed notes, and its model not to cut them at one note's limit."""
    import unsloth.models.llama as unsloth_llama
    from unsloth.utils.packing import mark_allow_overlength

    stock = getattr(unsloth_llama, _STOCK, unsloth_llama.run_attention)
    setattr(unsloth_llama, _STOCK, stock)
    unsloth_llama.run_attention = packing.route(stock, packing.varlen_kernel(max_length))
    mark_allow_overlength(model)


def _is_missing(error: Exception) -> bool:
    """Whether a loader's error says that there is nothing to load: an OSError, or Unsloth's own words for it."""
    return isinstance(error, OSError) or "No config file found" in str(error) or "offline" in str(error).lower()
