"""Loading the base model through Unsloth, in 4 bit, with a fresh adapter.

Unsloth on a GPU patches the model's classes (fast kernels, a fused loss); on a CPU it is stock transformers and PEFT.
What differs between the two stays here and in `backbone.py`, which is the model at work.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn

from medlit.errors import UserError
from medlit.model import attention
from medlit.model.backbone import checkpointing
from medlit.model.checks import check_held, check_loftq, check_room, check_stored, check_targets
from medlit.model.precision import dtype_for
from medlit.model.settings import Backbone, Lora
from medlit.weights import missing, resolve

# Where Unsloth's own attention call is kept while medlit's stands in its place.
_STOCK = "_medlit_stock_run_attention"
_log = logging.getLogger(__name__)


def load(backbone: Backbone, lora: Lora | None, device: torch.device) -> nn.Module:
    """Load the base model on a device and give it a fresh adapter.

    Args:
        backbone: what to load.
        lora: the adapter's shape; None leaves the bare base model.
        device: where this process computes.

    Raises:
        UserError: there is no such model, or it or the machine cannot hold it as asked.
    """
    from unsloth import FastLanguageModel  # isort: skip - before transformers
    from transformers import AutoConfig

    if device.type == "cpu" and lora is not None and backbone.dtype == "float16":
        raise UserError("model.backbone.dtype: float16 does not train on a CPU; set it to 'auto'.")
    chatter = io.StringIO()
    where = resolve(backbone.base_model)
    try:
        config = AutoConfig.from_pretrained(where, revision=backbone.revision, trust_remote_code=False)
        check_stored(backbone, config)
        check_room(backbone, config, device)
        # Unsloth prints a banner to standard output, where a prediction may be expected.
        with contextlib.redirect_stdout(chatter):
            model, _ = FastLanguageModel.from_pretrained(
                where,
                revision=backbone.revision,
                # Otherwise Unsloth takes another repository for many a name ('-bnb-4bit' added for 4 bits, cut off for
                # 16) and drops the revision; and for a name that it does not know it asks GitHub for a newer list.
                use_exact_model_name=True,
                max_seq_length=backbone.max_length,
                dtype=dtype_for(device, backbone.dtype),
                load_in_4bit=backbone.load_in_4bit,
                device_map={"": str(device)},
                use_gradient_checkpointing=checkpointing(backbone),
                trust_remote_code=False,
            )
            check_held(model, backbone)
            if lora is not None:
                check_targets(model, lora.target_modules)
                if lora.loftq:
                    check_loftq(model, device)
                model = FastLanguageModel.get_peft_model(
                    model,
                    **lora.as_peft(),
                    init_lora_weights="loftq" if lora.loftq else True,
                    loftq_config={"loftq_bits": 4, "loftq_iter": 1} if lora.loftq else None,
                    use_gradient_checkpointing=checkpointing(backbone),
                    random_state=lora.seed,
                    max_seq_length=backbone.max_length,
                )
    except (SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"model.backbone.base_model: {backbone.base_model} holds weights that are cut short, damaged, or mixed with"
            " code; fetch or copy them again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or not _is_missing(error):
            raise
        raise missing(backbone.base_model, backbone.revision) from error
    finally:
        for line in filter(str.strip, chatter.getvalue().splitlines()):
            _log.debug(line)
    if device.type == "cuda":
        _let_pack(model, backbone.max_length)
    return model  # type: ignore[no-any-return]


def _let_pack(model: nn.Module, max_length: int) -> None:
    """Teach Unsloth's Llama attention to take packed notes, and its model not to cut them at one note's limit."""
    import unsloth.models.llama as unsloth_llama
    from unsloth.utils.packing import mark_allow_overlength

    stock = getattr(unsloth_llama, _STOCK, unsloth_llama.run_attention)
    setattr(unsloth_llama, _STOCK, stock)
    unsloth_llama.run_attention = attention.route(stock, attention.varlen_kernel(max_length))
    mark_allow_overlength(model)


def _is_missing(error: Exception) -> bool:
    """Whether a loader's error says that there is nothing to load: an OSError, or Unsloth's own words for it."""
    return isinstance(error, OSError) or "No config file found" in str(error) or "offline" in str(error).lower()
