"""Running the language model: its modes, its number format and its loss; `loading.py` loads it.

On a GPU Unsloth patches the model's classes; on a CPU it is stock transformers and PEFT.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medlit.data.collate import Batch
from medlit.errors import UserError
from medlit.model import memory
from medlit.model.families import block_swap, body, causal_lm, decoder_layers, has_dropout
from medlit.model.head import head_logits
from medlit.model.packing import can_pack, states_read
from medlit.model.settings import LanguageModel, Lora

LOGIT_ROWS = 2048  # rows of logits held at once: 2,048 x 128,256 in float32 are 1 GiB
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FP8 = torch.float8_e4m3fn


class Fp8Linear(nn.Linear):
    """A frozen linear layer with weights in FP8 (e4m3) and a scale for each row.

    In training Unsloth's kernels multiply them by inputs that are rounded to FP8 too. Elsewhere they are expanded where
    they are read, so that answers are the same on every device and depend on no other note of a batch.
    """

    codes: Tensor  # bytes: neither DDP nor a change of the model's dtype takes them for numbers
    weight_scale: Tensor  # Unsloth looks for this name

    @classmethod
    def convert(cls, layer: nn.Linear) -> None:
        """Convert a linear layer to FP8."""
        weight: Any = layer._parameters.pop("weight")
        peak = weight.detach().float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        scale = (peak / torch.finfo(_FP8).max).bfloat16().float()  # the same number in every dtype
        layer.codes = nn.Parameter((weight.detach().float() / scale).to(_FP8).view(torch.uint8), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        layer.__class__ = cls
        layer._view_codes()  # type: ignore[operator]

    def _view_codes(self) -> None:
        """Show the stored codes as numbers in `_weight`, in the same memory; repeated after each move."""
        # A parameter, though of no module: compiled code may not take its shape for one that changes.
        vars(self)["_weight"] = nn.Parameter(self.codes.view(_FP8), requires_grad=False)

    def _apply(self, *arguments: Any) -> Self:  # noqa: ANN401 - passed on
        super()._apply(*arguments)  # type: ignore[no-untyped-call]
        self._view_codes()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._view_codes()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """In FP8 in training, else expanded, (outputs, inputs)."""
        weight: Tensor = vars(self)["_weight"]
        return weight if self.training else weight.to(self.weight_scale.dtype) * self.weight_scale

    def forward(self, hidden: Tensor) -> Tensor:
        """The output, (..., outputs), for families whose layers Unsloth does not replace."""
        if not self.training:
            return super().forward(hidden)
        from unsloth.kernels.fp8 import fp8_linear

        out: Tensor = fp8_linear(hidden.to(self.weight_scale.dtype), self.weight, self.weight_scale, self.bias)
        return out


def check_fp8(of: LanguageModel, lora: Lora | None, trained_on: torch.device | None = None) -> None:
    """Raise a UserError if weights cannot be held in FP8 as set, or not for training on a device."""
    others = lora is not None and (lora.dora or lora.bias != "none")
    is_old = trained_on and (trained_on.type != "cuda" or torch.cuda.get_device_capability(trained_on) < (8, 9))
    obstacles = {
        "not together with load_in_4bit; set one of them to false": of.load_in_4bit,
        "not together with DoRA or trained biases; set it to false, or leave those out": others,
        "computes in bfloat16; set model.language_model.dtype to 'auto'": of.dtype in ("float16", "float32"),
        "trains on GPUs from compute capability 8.9 on (L40S, H100); set it to false": is_old,
    }
    if of.load_in_fp8 and (why := next((each for each, found in obstacles.items() if found), "")):
        raise UserError(f"model.language_model.load_in_fp8: {why}.")


def dtype_for(device: torch.device, name: str = "auto") -> torch.dtype:
    """Number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def default_precision(on_gpu: bool, dtype: str = "auto") -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """Lightning's name for the precision that fits frozen weights in a format; the adapter itself stays in float32."""
    if not on_gpu:
        return "32-true"
    # Unsloth's kernels take weights in half precision in autocast's own format alone.
    half = dtype_for(torch.device("cuda"), "auto" if dtype == "float32" else dtype)
    return "16-mixed" if half == torch.float16 else "bf16-mixed"


def at_default_precision(model: nn.Module) -> AbstractContextManager[None]:
    """The autocast context of Lightning's loops at the model's default precision, for code outside a loop."""
    inner = causal_lm(model)
    dtype = next((name for name, each in _DTYPES.items() if each == inner.dtype), "auto")
    precision = default_precision(inner.device.type == "cuda", dtype)
    return nullcontext() if precision == "32-true" else MixedPrecision(precision, inner.device.type).forward_context()


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
    for layer in decoder_layers(model):
        # With this flag a layer that fills a cache leaves the fused kernels of training.
        layer.__dict__.pop("_flag_for_generation", None)


def make_recomputation(
    model: nn.Module, language_model: LanguageModel, lora: Lora | None
) -> memory.Recomputation | None:
    """The chooser of the layers that each micro-batch recomputes, of newly loaded weights; None without a choice."""
    device = causal_lm(model).device
    if language_model.gradient_checkpointing != "auto" or device.type != "cuda":
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dora = lora is not None and lora.dora
    footprint = memory.footprint(causal_lm(model).config, torch.cuda.memory_allocated(device), trained, dora)
    budget = memory.budget_on(device, language_model.memory_budget_gib)
    layers, offloaded = decoder_layers(model), getattr(block_swap(model), "indices", ())
    return memory.Recomputation(layers, footprint, budget, random=has_dropout(model), offloaded=offloaded)


def loss_sum(model: nn.Module, batch: Batch, recomputation: memory.Recomputation | None = None) -> Tensor:
    """Summed negative log-likelihood of a batch's supervised tokens, in nats, float32, shape ().

    The head runs at supervised positions only: an answer of 5 tokens needs 5 rows of logits, not one for each of the
    note's tokens. There is no mask: attention is causal, and right padding comes after every real token.
    """
    if batch.parts and not (model.training and can_pack(model)):
        batch = batch.padded()
    rows = states_read(body(model), batch, recomputation)  # (S, D)
    total = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        if len(rows) > LOGIT_ROWS and rows.requires_grad:
            total = total + checkpoint(_head_loss, model, rows[part], batch.targets[part], use_reentrant=False)
        else:
            total = total + _head_loss(model, rows[part], batch.targets[part])
    return total


def _head_loss(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(head_logits(model, hidden), targets, reduction="sum")
