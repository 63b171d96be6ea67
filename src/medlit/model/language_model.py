"""The language model at work: its modes, its number format and its loss; `loading.py` loads it.

On a GPU Unsloth patches the model's classes; on a CPU it is stock transformers and PEFT.

Packed notes lie end to end in one row, and each token attends to its own note's earlier tokens. Unsloth compiles a
decoder layer into one region, but not when it is given packed lengths, and without flash-attn it then runs one kernel a
note. PyTorch's varlen kernel takes all notes at once and compiles; so the notes' starts travel to the attention call in
place of a mask, which nothing else reads in training. Measured on an H100 (8B, NF4, LoRA r 16, 32 notes a step in 4
micro-batches): 15,000 tokens/s without recomputation and 10,600 with it; Unsloth's packing inside TRL's trainer, which
recomputes, reached 5,800.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medlit.base_model import PACKING_FAMILY
from medlit.data.collate import Batch
from medlit.model import memory
from medlit.model.families import body, causal_lm, decoder_layers, has_dropout, head_logits
from medlit.model.settings import LanguageModel, Lora

# Rows of logits held at once: 2,048 x 128,256 in float32 are 1 GiB.
_LOGIT_ROWS = 2048
# Attribute of Unsloth's module that keeps its own attention call.
_STOCK = "_medlit_stock_run_attention"
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_for(device: torch.device, name: str = "auto") -> torch.dtype:
    """Number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def default_precision(on_gpu: bool) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """Lightning's name for the format that `dtype_for` chooses; the adapter itself stays in float32."""
    dtype = dtype_for(torch.device("cuda" if on_gpu else "cpu"))
    return "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed" if dtype == torch.float16 else "32-true"


def at_default_precision(device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of Lightning's loops at the default precision, for code outside a loop."""
    precision = default_precision(device.type == "cuda")
    return nullcontext() if precision == "32-true" else MixedPrecision(precision, device.type).forward_context()


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def unsloth_checkpointing(language_model: LanguageModel) -> str | bool:
    """Unsloth's checkpointing; under 'auto' medlit chooses for each micro-batch, see `make_recomputation`."""
    return "unsloth" if language_model.gradient_checkpointing == "unsloth" else False


def train_mode(model: nn.Module, language_model: LanguageModel) -> None:
    """Turn on dropout, gradient checkpointing and the training kernels."""
    from unsloth import FastLanguageModel

    model.train()
    FastLanguageModel.for_training(model, use_gradient_checkpointing=unsloth_checkpointing(language_model))
    # After a forward pass without labels Unsloth would multiply packed embeddings by a mask of one note's length.
    body(model)._has_no_labels = False


def inference_mode(model: nn.Module) -> None:
    """Turn off dropout and gradient checkpointing, turn on the generation kernels."""
    from unsloth import FastLanguageModel

    model.eval()
    FastLanguageModel.for_inference(model)


def make_recomputation(
    model: nn.Module, language_model: LanguageModel, lora: Lora | None
) -> memory.Recomputation | None:
    """The chooser of the layers that each micro-batch recomputes; None where there is no choice.

    Call it after the weights are loaded and before anything is trained.
    """
    device = causal_lm(model).device
    if language_model.gradient_checkpointing != "auto" or device.type != "cuda":
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dora = lora is not None and lora.dora
    footprint = memory.footprint(causal_lm(model).config, torch.cuda.memory_allocated(device), trained, dora)
    budget = memory.budget_on(device, language_model.memory_budget_gib)
    return memory.Recomputation(decoder_layers(model), footprint, budget, random=has_dropout(model))


def loss_sum(model: nn.Module, batch: Batch, recomputation: memory.Recomputation | None = None) -> Tensor:
    """Summed negative log-likelihood of a batch's supervised tokens, in nats, float32, shape ().

    The head runs at supervised positions only: an answer of 5 tokens needs 5 rows of logits, not one for each of the
    note's tokens. There is no mask: attention is causal, and right padding comes after every real token.
    """
    if batch.starts is not None and not (model.training and can_pack(model)):
        batch = batch.padded()
    if recomputation is not None:
        recomputation.prepare(batch.input_ids.numel())
    hidden = _hidden(body(model), batch).flatten(0, 1)  # (B * T, D)
    rows = hidden.index_select(0, batch.places)  # (S, D)
    total = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        if len(rows) > _LOGIT_ROWS and rows.requires_grad:
            total = total + checkpoint(_head_loss, model, rows[part], batch.targets[part], use_reentrant=False)
        else:
            total = total + _head_loss(model, rows[part], batch.targets[part])
    return total


def _hidden(inner: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - see causal_lm
    """The last layer's output, (B, T, D)."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.starts is not None:
        # The starts travel where only medlit's attention looks. The mask of ones is dropped in training, but without
        # one Unsloth would derive the packing from the positions and leave its compiled layers for it.
        arguments |= {
            "position_ids": batch.positions,
            "causal_mask": batch.starts,
            "attention_mask": torch.ones_like(batch.input_ids),
        }
    hidden: Tensor = inner(**arguments)[0]
    return hidden


def _head_loss(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(head_logits(model, hidden), targets, reduction="sum")


def can_pack(model: nn.Module) -> bool:
    """Whether a model's attention takes packed notes: a Llama's on a GPU from Ampere on."""
    inner = causal_lm(model)
    if inner.device.type != "cuda" or inner.config.model_type != PACKING_FAMILY:
        return False
    return torch.cuda.get_device_capability(inner.device) >= (8, 0)


def enable_packing(model: nn.Module, max_length: int) -> None:
    """Let Unsloth's Llama attention take packed notes, and keep its model from cutting them at one note's limit."""
    import unsloth.models.llama as unsloth_llama
    from unsloth.utils.packing import mark_allow_overlength

    stock = getattr(unsloth_llama, _STOCK, unsloth_llama.run_attention)
    setattr(unsloth_llama, _STOCK, stock)
    unsloth_llama.run_attention = route(stock, varlen_kernel(max_length))
    mark_allow_overlength(model)


def varlen_kernel(longest: int) -> Kernel:
    """PyTorch's causal varlen attention: (T, heads, D) queries, keys and values and (notes + 1,) starts.

    Args:
        longest: most tokens of a note; the same for every batch, so that nothing is compiled again.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # PyTorch 2.11 groups queries by itself; later versions need the flag.
    extra: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    extra["window_size"] = (-1, 0)  # all earlier tokens, no later ones

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        out = varlen_attn(query, key, value, starts, starts, longest, longest, **extra)
        return out  # type: ignore[return-value]

    return kernel


def route(stock: Callable[..., Tensor], kernel: Kernel) -> Callable[..., Tensor]:
    """Unsloth's attention call, which sends packed notes, recognised by a mask of one dimension, to a varlen kernel."""

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: ANN401
        starts = context.causal_mask
        if isinstance(starts, torch.Tensor) and starts.dim() == 1:
            query, key, value = (x.squeeze(0).transpose(0, 1).contiguous() for x in (Q, K, V))
            return kernel(query, key, value, starts).unsqueeze(0)
        return stock(config=config, context=context, Q=Q, K=K, V=V)

    return run_attention
