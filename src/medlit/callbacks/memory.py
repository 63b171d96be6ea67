"""A GPU whose memory does not suffice, or a budget that is too small: which setting to change, and what it takes."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from medlit.callbacks.run_folder import run_folder, verb_of
from medlit.data.collate import Batch
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.model.memory import GIB, Footprint, Recomputation
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import LanguageModel

# Activations kept by "unsloth" checkpointing as a share of all of them, 8B: (9.6 - 6) of (60.3 - 6) GiB.
CHECKPOINTED = 0.07
# What to stay within, as a share of what was taken when the memory was full.
CALMER = 0.9


class MemoryWatch(L.Callback):
    """Knows, when the memory is full, what was going on and how much the weights alone took."""

    def __init__(self) -> None:
        self.doing = ""
        self.weights = 0.0
        self.takes: Footprint | None = None
        self.folder: Path | None = None
        self.last: Path | None = None
        self.warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the weights, before there is any activation; by now the module knows what a batch takes."""
        self.folder = run_folder(trainer)  # now, when every process asks: in an exception one may be alone
        self.weights = _allocated()
        if isinstance(pl_module, SpecialtyClassifier) and pl_module.recomputation is not None:
            self.takes = pl_module.recomputation.footprint

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Say once that a micro-batch takes more than the budget, however much is computed again."""
        if self.warned or not isinstance(pl_module, SpecialtyClassifier) or pl_module.recomputation is None:
            return
        tokens = batch.input_ids.numel()
        if pl_module.recomputation.excess(tokens):
            self.warned = True
            rank_zero_warn(over_budget(pl_module.recomputation, tokens, trainer.datamodule))  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Note whether a fit was training, or a model answering, and the last checkpoint; nothing while one loads."""
        if isinstance(pl_module, SpecialtyClassifier) and pl_module.model is None:
            return
        fitting = verb_of(trainer) == "fit"
        self.doing = "training" if trainer.training and fitting else "answering"
        if fitting and self.folder is not None:
            last = self.folder / "checkpoints" / "last.ckpt"
            self.last = last if last.exists() else None

    def told(self, language_model: LanguageModel, data: TranscriptionDataModule) -> UserError:
        """What to tell a user whose run ended so."""
        if torch.cuda.is_available():
            peak, total = torch.cuda.max_memory_allocated() / GIB, torch.cuda.mem_get_info()[1] / GIB
        else:
            peak = total = 0.0
        kept = f" The last good checkpoint is {self.last}." if self.last else ""
        return UserError(advice(self.doing, language_model, data, self.weights, peak, total, self.takes) + kept)


def over_budget(chosen: Recomputation, tokens: int, data: TranscriptionDataModule) -> str:
    """One sentence: that a micro-batch of T tokens needs more than it may take, and what would mend it."""
    needs = chosen.footprint.peak(tokens, 1) / GIB
    smaller = (
        f"; data.batching.micro_batch_size {data.batching.micro_batch_size // 2} takes less"
        if data.batching.micro_batch_size > 1
        else ""
    )
    return (
        f"model.language_model.memory_budget_gib: micro-batches of {tokens:,} tokens take about {needs:.1f} GiB with"
        f" every"
        f" layer but one computed again, more than the {chosen.budget / GIB:.1f} GiB that they may take{smaller}."
    )


def advice(
    doing: str,
    language_model: LanguageModel,
    data: TranscriptionDataModule,
    weights: float,
    peak: float,
    total: float,
    takes: Footprint | None = None,
) -> str:
    """One sentence: what to set, each with an estimate.

    Activations grow with the padded tokens of a batch, so half the batch or half the length take about half of them.
    What was taken when the memory was full is a lower bound, and so are the estimates. Where layers are computed again
    as memory demands, what was taken says nothing of the batch: there the footprint of the largest one is worked out,
    with one layer kept.

    Args:
        doing: 'training', 'answering', or '' before either.
        language_model: the model's settings.
        data: the data's settings.
        weights: GiB before the first step.
        peak: most GiB that were taken.
        total: GiB of the GPU; 0 where there is none to ask.
        takes: what a training batch takes, where layers are computed again as memory demands.
    """
    of = f" ({peak:.1f} of {total:.1f} GiB were taken)" if total else ""
    if not doing:
        return (
            f"model.language_model.base_model: {language_model.base_model} does not fit into this GPU's memory{of}; set"
            " model.language_model.load_in_4bit to true, choose a smaller model or free the GPU."
        )

    chosen = takes if doing == "training" else None

    def about(share: float) -> str:
        least = weights + share * (peak - weights)
        if chosen is not None:
            least = chosen.peak(int(share * data.token_budget), 1) / GIB
        return f" (about {least:.1f} GiB or more)" if total else ""

    batch = "data.batching.micro_batch_size" if doing == "training" else "data.batching.eval_batch_size"
    size = data.batching.micro_batch_size if doing == "training" else data.batching.eval_batch_size
    choices = []
    if chosen is not None and chosen.peak(data.token_budget, 1) / GIB < CALMER * peak:
        # More was kept than there turned out to be room for, as when another process came to the GPU.
        choices.append(f"model.language_model.memory_budget_gib to {CALMER * peak:.1f}")
    choices += [f"{batch} to {size // 2}{about(0.5)}"] if size > 1 else []
    choices.append(f"model.language_model.max_length to {language_model.max_length // 2}{about(0.5)}")
    if doing == "training" and language_model.gradient_checkpointing != "unsloth":
        spared = about(CHECKPOINTED) if chosen is None else ""
        choices.append(f"model.language_model.gradient_checkpointing to 'unsloth'{spared}")
    return f"{batch}: the GPU's memory does not suffice for {doing}{of}; set {', or '.join(choices)}."


def _allocated() -> float:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
