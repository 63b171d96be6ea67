"""The language model behind Unsloth: loading it in 4 bit, its fresh adapter, its modes and its loss.

Unsloth on a GPU patches the model's classes (fast kernels, a fused loss); on a CPU it is stock transformers and PEFT.
What differs between the two stays in this file.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medlit.data.batches import Batch
from medlit.errors import UserError
from medlit.model import attention, memory
from medlit.model.settings import Backbone, Lora
from medlit.weights import PACKED, missing, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Where Unsloth's own attention call is kept while medlit's stands in its place.
_STOCK = "_medlit_stock_run_attention"
# Rows of logits held at once: 2,048 x 128,256 in float32 are 1 GiB.
_LOGIT_ROWS = 2048
_log = logging.getLogger(__name__)


def dtype_for(device: torch.device, name: str = "auto") -> torch.dtype:
    """Number format of the frozen computation on a device."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


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
        _check_room(backbone, config, device)
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
                use_gradient_checkpointing=_checkpointing(backbone),
                trust_remote_code=False,
            )
            _check_held(model, backbone)
            if lora is not None:
                _check_targets(model, lora.target_modules)
                if lora.loftq:
                    _check_loftq(model, device)
                model = FastLanguageModel.get_peft_model(
                    model,
                    r=lora.r,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    bias=lora.bias,
                    target_modules=list(lora.target_modules),
                    use_rslora=lora.rslora,
                    init_lora_weights="loftq" if lora.loftq else True,
                    loftq_config={"loftq_bits": 4, "loftq_iter": 1} if lora.loftq else None,
                    use_gradient_checkpointing=_checkpointing(backbone),
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


def _check_room(backbone: Backbone, config: PretrainedConfig, device: torch.device) -> None:
    """A model that is far too large would be read for minutes, 40 GB and more, before it fails.

    Raises:
        UserError: its weights alone are more than there is room for.
    """
    in_4bit = backbone.load_in_4bit or hasattr(config, "quantization_config")
    needs = memory.loaded(config.get_text_config(), in_4bit, dtype_for(device, backbone.dtype).itemsize)
    free = memory.free_on(device)
    if needs <= free:
        return
    where = f"the GPU {device} has" if device.type == "cuda" else "this machine has"
    raise UserError(
        f"model.backbone.base_model: the weights of {backbone.base_model} take about {needs / memory.GIB:,.0f} GiB"
        f"{' in 4 bit' if in_4bit else ''}, and {where} {free / memory.GIB:,.1f} GiB free; every process holds the"
        " whole model, so choose a smaller base model or a device with more memory."
    )


def check_stored(backbone: Backbone, config: PretrainedConfig) -> None:
    """Weights that are stored in 4 bits load in 4 bits, whatever is asked for; say so before they are fetched.

    Args:
        backbone: what to load.
        config: the base model's own.

    Raises:
        UserError: 16 bits are asked for.
    """
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("load_in_4bit") and not backbone.load_in_4bit:
        raise UserError(
            f"model.backbone.load_in_4bit: {backbone.base_model} is stored in 4-bit; set it to true, or name a base"
            " model with 16-bit weights."
        )


def _check_held(model: nn.Module, backbone: Backbone) -> None:
    """Unsloth falls back to 16 bits without an error.

    Raises:
        UserError: 4 bits are asked for.
    """
    from bitsandbytes.nn import Params4bit

    if backbone.load_in_4bit and not any(isinstance(parameter, Params4bit) for parameter in model.parameters()):
        raise UserError(
            f"model.backbone.load_in_4bit: {backbone.base_model} did not load in 4-bit: Unsloth keeps a repository"
            " named '-bf16' in 16 bits, and all of them where bitsandbytes does not work ('medlit doctor' tells); set"
            " it to false, or name another base model."
        )


def _checkpointing(backbone: Backbone) -> str | bool:
    # Under 'auto' each micro-batch chooses for itself: see `recomputation`.
    return "unsloth" if backbone.gradient_checkpointing == "unsloth" else False


def _let_pack(model: nn.Module, max_length: int) -> None:
    """Teach Unsloth's Llama attention to take packed notes, and its model not to cut them at one note's limit."""
    import unsloth.models.llama as unsloth_llama
    from unsloth.utils.packing import mark_allow_overlength

    stock = getattr(unsloth_llama, _STOCK, unsloth_llama.run_attention)
    setattr(unsloth_llama, _STOCK, stock)
    unsloth_llama.run_attention = attention.route(stock, attention.varlen_kernel(max_length))
    mark_allow_overlength(model)


def packs(model: nn.Module) -> bool:
    """Whether a model takes packed notes as they are: a Llama in half precision on a GPU from Ampere on."""
    inner = causal_lm(model)
    if inner.device.type != "cuda" or inner.config.model_type != PACKED:
        return False
    return torch.cuda.get_device_capability(inner.device) >= (8, 0)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """PEFT passes over a target that no layer has as long as another one has.

    Raises:
        UserError: the model has no such layers.
    """
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    # Unsloth takes the names of split projections for a model that has them in one.
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    absent = [name for name in targets if name not in leaves and fused.get(name) not in leaves]
    if absent:
        linear = sorted({name for name in leaves if name.endswith("_proj")})
        raise UserError(
            f"model.lora.target_modules: the base model has no layer called {absent[0]!r}; it has {', '.join(linear)}."
        )


def _check_loftq(model: nn.Module, device: torch.device) -> None:
    """LoftQ quantises the weights itself, with kernels that only a GPU has.

    Raises:
        UserError: there is no GPU, or the weights are quantised already.
    """
    from bitsandbytes.nn import Params4bit

    if device.type != "cuda":
        raise UserError("model.lora.loftq: it is computed on a GPU; set it to false on this machine.")
    if any(isinstance(parameter, Params4bit) for parameter in model.parameters()):
        raise UserError(
            "model.lora.loftq: it starts from weights that are not yet in 4-bit; set model.backbone.load_in_4bit to"
            " false and name a base model that is not quantised."
        )


def _is_missing(error: Exception) -> bool:
    """Whether a loader's error says that there is nothing to load: an OSError, or Unsloth's own words for it."""
    return isinstance(error, OSError) or "No config file found" in str(error) or "offline" in str(error).lower()


def train_mode(model: nn.Module, backbone: Backbone) -> None:
    """Dropout, gradient checkpointing and the training kernels on."""
    from unsloth import FastLanguageModel

    model.train()
    FastLanguageModel.for_training(model, use_gradient_checkpointing=_checkpointing(backbone))


def recomputation(model: nn.Module, backbone: Backbone, lora: Lora) -> memory.Recomputation | None:
    """What chooses, for each micro-batch, which layers are computed again; None where there is no choice.

    Called when the weights are loaded and nothing has been trained yet.
    """
    inner = causal_lm(model)
    device = inner.device
    if backbone.gradient_checkpointing != "auto" or device.type != "cuda":
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    takes = memory.footprint(inner.config, torch.cuda.memory_allocated(device), trained)
    budget = memory.budget_on(device, backbone.memory_budget_gib)
    return memory.Recomputation(inner.model.layers, takes, budget, random=lora.dropout > 0)


def answer_mode(model: nn.Module) -> None:
    """Dropout and gradient checkpointing off, the generation kernels on."""
    from unsloth import FastLanguageModel

    model.eval()
    FastLanguageModel.for_inference(model)


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def loss_sum(model: nn.Module, batch: Batch, recomputation: memory.Recomputation | None = None) -> Tensor:
    """Summed negative log-likelihood of a batch's supervised tokens, in nats, float32, shape ().

    The head runs at supervised positions only: an answer of 5 tokens needs 5 rows of logits, not one for each of the
    note's tokens. Without a mask the attention is causal, and right padding lies behind every real token.
    """
    inner = causal_lm(model)
    if batch.starts is not None and not (model.training and packs(model)):
        batch = batch.padded()
    if recomputation is not None:
        recomputation.prepare(batch.input_ids.numel())
    hidden = _hidden(inner, batch).flatten(0, 1)  # (B * T, D)
    rows = hidden.index_select(0, batch.places)  # (S, D)
    total = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        if len(rows) > _LOGIT_ROWS and rows.requires_grad:
            total = total + checkpoint(_head_loss, inner, rows[part], batch.targets[part], use_reentrant=False)
        else:
            total = total + _head_loss(inner, rows[part], batch.targets[part])
    return total


def _hidden(inner: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - see causal_lm
    """The last layer's output, (B, T, D)."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.starts is not None:
        # The starts go where nothing but medlit's attention looks. The mask of ones is dropped in training, but without
        # one Unsloth would work out the packing itself, from the positions, and leave its compiled layers for it.
        arguments |= {
            "position_ids": batch.positions,
            "causal_mask": batch.starts,
            "attention_mask": torch.ones_like(batch.input_ids),
        }
    hidden: Tensor = inner.model(**arguments)[0]
    return hidden


def _head_loss(inner: Any, hidden: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401 - see causal_lm
    logits = inner.lm_head(hidden.to(inner.lm_head.weight.dtype)).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    if cap:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    total: Tensor = functional.cross_entropy(logits, targets, reduction="sum")
    return total


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
