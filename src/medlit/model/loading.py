"""Loading the base model through Unsloth with a new adapter; what cannot be loaded as set is refused."""

import contextlib
import gc
import io
import logging
from collections.abc import Iterator
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from medlit.base_model import missing, read_config, resolve, unreadable, untried_family
from medlit.errors import UserError, report_if_slow, tell
from medlit.model import families, memory
from medlit.model.families import PREFIXES, causal_lm, fit_targets, load_options, peft_targets, target_layers
from medlit.model.fit_memory import Offload, peak_of_loading, plan_offload
from medlit.model.language_model import Fp8Linear, check_fp8, dtype_for, unsloth_checkpointing
from medlit.model.packing import enable_last_layer, enable_packing
from medlit.model.self_check import check_numbers
from medlit.model.settings import LanguageModel, Lora

_log = logging.getLogger(__name__)


def load_model(language_model: LanguageModel, lora: Lora | None, device: torch.device) -> nn.Module:
    """Load the base model on a device with a new adapter, or bare without LoRA settings; a UserError if that fails."""
    from unsloth import FastLanguageModel  # isort: skip - before transformers
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_fp8(language_model, lora)
    if device.type == "cpu" and lora is not None and language_model.dtype == "float16":
        raise UserError("model.language_model.dtype: float16 does not train on a CPU; set it to 'auto'.")
    gc.collect()  # a model that only its own cycles hold, such as an earlier one of this process
    config = read_config(language_model.base_model, language_model.revision)
    check_stored(language_model, config)
    with report_if_slow(f"loading {language_model.base_model}", has_bar=True), _load_errors(language_model) as reports:
        skeleton = memory.skeleton(config)
        if (most := families.most_tokens(skeleton) or language_model.max_length) < language_model.max_length:
            raise UserError(
                f"model.language_model.max_length: {language_model.base_model} takes at most {most} tokens (its"
                f" positions end there, or change for longer notes); set it to {most} or less."
            )
        requested, lora = lora, None if lora is None else fit_targets(skeleton, lora)
        dtype = dtype_for(device, language_model.dtype)
        offload = plan_offload(skeleton, language_model, lora, device, dtype)
        needed = peak_of_loading(skeleton, language_model, offload.weights, dtype)
        _check_memory(language_model, config, device, offload, needed)
        # Unsloth offloads a layer only if it is recomputed; 'auto' still chooses among the others.
        checkpointing = unsloth_checkpointing(language_model) or offload.layers > 0
        # Lightning makes the GPU the default device, where Unsloth would then put the host's copies.
        with torch.device("cpu") if offload.layers else contextlib.nullcontext():
            model, _ = FastLanguageModel.from_pretrained(
                resolve(language_model.base_model),
                revision=language_model.revision,
                # Otherwise Unsloth replaces many names by another repository ('-bnb-4bit' added or cut off), drops the
                # revision, and asks GitHub for a newer list of names that it does not know.
                use_exact_model_name=True,
                max_seq_length=language_model.max_length,
                dtype=dtype,
                load_in_4bit=language_model.load_in_4bit,
                device_map={"": str(device)},
                use_gradient_checkpointing=checkpointing,
                trust_remote_code=False,
                **load_options(config, on_gpu=device.type == "cuda"),
                **({"offload_layers": offload.layers} if offload.layers else {}),
            )
        if reports:
            raise ValueError(reports[0])
        _check_loaded(model, language_model)
        if getattr(model.config, "rescale_every", 0):  # RWKV's: evaluation divides base weights, and not the adapter's
            model.config.rescale_every = 0
        linear = [part for part in families.adaptable_layers(model).values() if isinstance(part, nn.Linear)]
        vars(model).update({name: value for name, value in vars(skeleton).items() if name == PREFIXES})
        if lora is not None:
            chosen = target_layers(model, lora).keys()
            model = FastLanguageModel.get_peft_model(
                model,
                **lora.as_peft() | peft_targets(model, lora),
                target_parameters=[],  # Unsloth adds a mixture's experts otherwise
                use_gradient_checkpointing=checkpointing,
                random_state=lora.seed,
                max_seq_length=language_model.max_length,
            )
            for name, parameter in model.named_parameters():  # Unsloth freezes what is no LoRA matrix
                ends = {"all": ".bias", "lora_only": ".base_layer.bias"}
                if lora.bias in ends and name.endswith(ends[lora.bias]):
                    parameter.requires_grad_(True)
            adapted = {n for n, part in causal_lm(model).named_modules() if isinstance(part, BaseTunerLayer)}
            if adapted and (wrong := adapted ^ chosen):
                raise UserError(f"model.lora.target_modules: PEFT cannot adapt just these layers, see {min(wrong)}.")
            if lora != requested:
                names = ", ".join(lora.target_modules)
                tell(f"model.lora.target_modules: the default does not fit the base model; adapting its {names}")
    for part in linear if language_model.load_in_fp8 else ():
        Fp8Linear.convert(part)
    if device.type == "cuda":
        from unsloth.kernels import fast_lora

        # cuDNN's attention plans each length for 150 ms at its first use (benchmarks/README.md).
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Unsloth looks these classes up in sys.modules, which changed while PyTorch compiled that, so nothing was.
        fast_lora._FORWARD_FAKE_QUANT_LINEARS = ()
        enable_packing(model, language_model.max_length)
    enable_last_layer(model)
    check_numbers(model, language_model)
    if untried := untried_family(causal_lm(model).config):
        tell(f"{language_model.base_model}: {untried}")
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _load_errors(language_model: LanguageModel) -> Iterator[list[str]]:
    """Make a UserError of what keeps a base model from loading; yields transformers' reports of weights not found."""
    name, output, reports = language_model.base_model, io.StringIO(), list[str]()

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if is_report := "MISSING" in text or "MISMATCH" in text:
            reports.append(text)
        return not is_report and "UNEXPECTED" not in text

    logger = logging.getLogger("transformers.modeling_utils")
    logger.filters.insert(0, keep)
    try:
        # Unsloth prints a banner to standard output, which is for predictions.
        with contextlib.redirect_stdout(output):
            yield reports
    except (SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"model.language_model.base_model: the weights of {name} are truncated, damaged, or mixed with code;"
            " download or copy them again."
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        if isinstance(error, OSError) or "No config file found" in str(error) or "offline" in str(error).lower():
            raise missing(name, language_model.revision) from error
        if reports:
            raise UserError(
                f"model.language_model.base_model: {name} lacks weights of its own architecture, or has them in another"
                " shape, and random numbers would take their place; choose another base model or download it again."
            ) from error
        raise unreadable(name, error) from error
    finally:
        logger.removeFilter(keep)
        for line in filter(str.strip, output.getvalue().splitlines()):
            _log.debug(line)


def check_stored(language_model: LanguageModel, config: PretrainedConfig) -> None:
    """Refuse to load weights in more bits than they are stored in, before they are downloaded."""
    stored = getattr(config, "quantization_config", None) or {}
    if stored and language_model.load_in_fp8:
        raise UserError(f"model.language_model.load_in_fp8: {language_model.base_model} is quantised; set it to false.")
    if stored.get("load_in_4bit") and not language_model.load_in_4bit:
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} is stored in 4-bit; set it to true, or"
            " name a base model with 16-bit weights."
        )


def _check_memory(
    language_model: LanguageModel, config: PretrainedConfig, device: torch.device, offload: Offload, needed: int
) -> None:
    """Refuse a model that is too large before its weights, stored in 16 or 4 bits, are read, which takes minutes."""
    stored = getattr(config, "quantization_config", None)
    if stored and not stored.get("load_in_4bit"):
        return
    free, host = memory.free_on(device), memory.free_on(torch.device("cpu"))
    taken = f"{offload.layers} decoder layers take {offload.host / memory.GIB:,.1f} GiB of host memory"
    if offload.host * offload.processes > host:
        raise UserError(
            f"model.language_model.offload: {taken} in each of {offload.processes} processes, and this machine has"
            f" {host / memory.GIB:,.1f} GiB free; set fewer trainer.devices or choose a smaller base model."
        )
    if needed > free:
        place = f"the GPU {device} has" if device.type == "cuda" else "this machine has"
        raise UserError(
            f"model.language_model.base_model: the weights of {language_model.base_model} take about"
            f" {needed / memory.GIB:,.0f} GiB{' in 4 bit' if language_model.load_in_4bit else ''}, and {place}"
            f" {free / memory.GIB:,.1f} GiB free; choose a smaller base model or a device with more memory."
        )
    if offload.layers:
        tell(taken)


def _check_loaded(model: nn.Module, language_model: LanguageModel) -> None:
    """Refuse a model that Unsloth loaded in 16 bits instead of 4, which it does without an error."""
    from bitsandbytes.nn import Params4bit

    if language_model.load_in_4bit and not any(isinstance(p, Params4bit) for p in model.parameters()):
        raise UserError(
            f"model.language_model.load_in_4bit: {language_model.base_model} did not load in 4-bit: Unsloth keeps a"
            " repository named '-bf16' in 16 bits, one with another quantisation (GPTQ, AWQ, fp8) as it is, and every"
            " model where bitsandbytes does not work (see 'medlit doctor'); set it to false, or name another base"
            " model."
        )
