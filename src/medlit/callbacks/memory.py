"""Advice when the memory is too small: which setting to change."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import psutil
import torch

from medlit.data.collate import Batch
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.model.families import causal_lm
from medlit.model.fit_memory import UNFUSED
from medlit.model.memory import GIB, SAFE, Footprint, MeasuredMemory, footprint
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import LanguageModel

Phase = Literal["loading", "training", "answering"]


class MemoryAdvice(L.Callback):
    """Records what a run was doing, for `out_of_memory_error`; on a CPU it refuses what would not fit."""

    phase: Phase = "loading"

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: int) -> None:
        """Refuse a micro-batch that this machine's memory cannot hold: the system would send SIGKILL."""
        if not isinstance(pl_module, SpecialtyClassifier) or pl_module.device.type != "cpu":
            return
        of = footprint(causal_lm(pl_module.model).config, 0, 0, dora=pl_module.lora.dora)  # type: ignore[arg-type, union-attr]
        kept = 1 if pl_module.language_model.gradient_checkpointing == "unsloth" else of.layers
        tokens, share = batch.input_ids.numel(), 0.5 if "16" in str(trainer.precision) else 1.0  # of float32's
        needed = share * UNFUSED * (of.peak(tokens, kept) - of.fixed)
        if needed > (memory := psutil.virtual_memory().total + psutil.swap_memory().total):
            setting = "data.batching.micro_batch_size" if len(batch.lengths) > 1 else "model.language_model.max_length"
            raise UserError(
                f"{setting}: to train on a micro-batch of {tokens:,} padded tokens takes about {needed / GIB:.1f} GiB"
                f" of memory, and this machine has {memory / GIB:.1f}; set it lower."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record what the run was doing."""
        if not isinstance(pl_module, SpecialtyClassifier) or pl_module.model is not None:
            self.phase = "training" if trainer.training else "answering"

    def out_of_memory_error(self, module: SpecialtyClassifier, data: TranscriptionDataModule) -> UserError:
        """The error message of a run that ended for lack of memory."""
        best: Any = module.trainer.checkpoint_callback  # every process knows its folder
        last = Path(str(best and best.dirpath), "last.ckpt")
        estimate = None if module.recomputation is None else module.recomputation.footprint
        measured = MeasuredMemory(0, 0)
        if torch.cuda.is_available():
            measured = MeasuredMemory(torch.cuda.max_memory_allocated() / GIB, torch.cuda.mem_get_info()[1] / GIB)
        message = memory_advice(self.phase, module.language_model, data, measured, estimate)
        kept = module.trainer.state.fn == "fit" and last.exists()
        return UserError(message + f" The last good checkpoint is {last}." * kept)


def memory_advice(
    phase: Phase,
    language_model: LanguageModel,
    data: TranscriptionDataModule,
    measured: MeasuredMemory,
    estimate: Footprint | None = None,
) -> str:
    """One sentence: the settings to change; `medlit doctor --config` estimates what they take."""
    usage = f" ({measured.peak:.1f} of {measured.total:.1f} GiB were in use)" if measured.total else ""
    if phase == "loading":
        instead = " and load_in_fp8 to false" if language_model.load_in_fp8 else ""
        return (
            f"model.language_model.base_model: {language_model.base_model} does not fit into this GPU's memory{usage};"
            f" set model.language_model.load_in_4bit to true{instead}, model.language_model.offload to 'auto' or more"
            " layers, choose a smaller model or free the GPU."
        )
    is_training = phase == "training"
    setting = "micro_batch_size" if is_training else "eval_batch_size"
    size = data.batching.micro_batch_size if is_training else data.batching.eval_batch_size
    choices = []
    budget = SAFE * measured.peak
    if is_training and estimate is not None and estimate.peak(data.token_budget, 1) / GIB < budget:
        # More layers were kept than there was room for, for example since another process uses the GPU.
        choices.append(f"model.language_model.memory_budget_gib to {budget:.1f}")
    if size > 1:
        choices.append(f"data.batching.{setting} to {size // 2}")
    choices.append(f"model.language_model.max_length to {language_model.max_length // 2}")
    if is_training and language_model.gradient_checkpointing != "unsloth":
        choices.append("model.language_model.gradient_checkpointing to 'unsloth'")
    return f"data.batching.{setting}: the GPU's memory is too small for {phase}{usage}; set {', or '.join(choices)}."
