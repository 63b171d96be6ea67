"""SpecialtyClassifier: the LightningModule around the language model. This half learns; `answering.py` answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from medlit.atomic_io import write_json
from medlit.base_model import load_tokenizer
from medlit.data.collate import Batch
from medlit.data.data_fingerprint import DataFingerprint
from medlit.data.labels import LabelSet
from medlit.data.prompt import INSTRUCTION, Keep
from medlit.errors import UserError
from medlit.model import adapter as adapters
from medlit.model import language_model as language_model
from medlit.model import loading
from medlit.model.adapter_metadata import LABELS_FILE, AdapterMetadata, check_metadata
from medlit.model.answering import AnsweringModule
from medlit.model.conditions import KEY, Conditions
from medlit.model.memory import Recomputation
from medlit.model.optimizer import check_groups, follow_settings, optimizer_for, schedule_for
from medlit.model.resume import last_step, repair_progress
from medlit.model.settings import Decoding, LanguageModel, Lora, Optimizer
from medlit.model.temperature import metadata_of_weights

TRAIN_LOSS = "train/loss"  # a metric's tag is `stage/name`


class SpecialtyClassifier(AnsweringModule):
    """Teaches a 4-bit language model to answer with a note's specialty, and counts what it really answers.

    Args:
        language_model: the frozen base model.
        lora: the adapter that is trained.
        optimizer: AdamW with 8-bit state and the course of its learning rate.
        decoding: how the model answers.
        adapter: start from this adapter, a folder or a Hub id; its r, alpha and targets must be those of model.lora.
            'none' is the bare base model.
        instruction: set from data.instruction.
        keep: set from data.keep.
    """

    def __init__(
        self,
        language_model: LanguageModel = LanguageModel(),  # noqa: B008 - defaults that the command line can show
        lora: Lora = Lora(),  # noqa: B008
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        decoding: Decoding = Decoding(),  # noqa: B008
        adapter: str | None = None,
        instruction: str = INSTRUCTION,
        keep: Keep = "head",
    ) -> None:
        super().__init__(language_model, decoding)
        self.lora = lora
        self.optimizer_settings = optimizer
        self.adapter = None if adapter == "none" else adapter
        self.instruction = instruction
        self.keep: Keep = keep
        self.recomputation: Recomputation | None = None  # known when a fit starts
        self.strict_loading = False  # a checkpoint holds the trained weights only; `on_load_checkpoint` compares keys

    def plain_settings(self) -> dict[str, Any]:
        """The settings as plain types, for a table of hyperparameters."""
        return {
            "language_model": asdict(self.language_model),
            "lora": asdict(self.lora),
            "optimizer": asdict(self.optimizer_settings),
            "decoding": asdict(self.decoding),
            "adapter": self.adapter,
        }

    # --- building -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the label names from the data, which is set up first; a table without labels leaves them open."""
        found: LabelSet | None = self.trainer.datamodule.label_set  # type: ignore[attr-defined]
        if found is not None:
            self.label_set = found
        if self.adapter is not None:
            folder = adapters.adapter_folder(self.adapter)
            file = folder / LABELS_FILE
            if file.is_file():
                self._adopt(AdapterMetadata.read(file), f"the adapter {folder}")
                if stage != "fit":  # an adapter may well be trained on with other notes
                    self.trainer.datamodule.compare_notes(DataFingerprint.read(file), f"the adapter {folder}")  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Load the base model and its adapter; Lightning calls this after `setup`, before a checkpoint is read."""
        if self.model is not None:
            return
        self.tokenizer = load_tokenizer(self.language_model.base_model, self.language_model.revision)
        self.model = loading.load(self.language_model, self.lora, self.trainer.strategy.root_device)
        if self.adapter is not None:
            adapters.load_adapter(self.model, adapters.adapter_folder(self.adapter))  # type: ignore[arg-type]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW8bit over the adapter, with a rate for each optimizer step."""
        optimizer = optimizer_for(self, self.optimizer_settings)
        schedule = schedule_for(optimizer, self.optimizer_settings, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The loader leaves evaluation mode, and Lightning does not undo that; new weights have no temperature yet."""
        self.temperatures = {}
        language_model.train_mode(self._model, self.language_model)
        self.recomputation = language_model.recomputation(self._model, self.language_model, self.lora)
        self._step_loss = torch.zeros((), device=self.device)

    def on_train_start(self) -> None:
        """A flag wins over what the checkpoint's optimizer and schedule remember."""
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        follow_settings(optimizer, schedule, self.optimizer_settings)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw dropout from the step and the micro-batch's place: a fit that goes on draws what it would have drawn.

        The weights of the last validation end here, and its temperature with them; what stops a fit comes before.
        """
        self.temperatures = {}
        if self.lora.dropout:
            place = [self.lora.seed, self.global_step, batch_idx, self.trainer.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This micro-batch's share of the optimizer step's mean loss over supervised tokens, in nats."""
        share = language_model.loss_sum(self._model, batch, self.recomputation) / batch.step_tokens
        self._step_loss += share.detach()
        # Lightning divides by the micro-batches of a step and DDP by the processes; the share is exact without either.
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the whole step's loss, once, without waiting for the device."""
        several = self.trainer.world_size > 1
        self.log(TRAIN_LOSS, self._step_loss, prog_bar=True, sync_dist=several, reduce_fx="sum" if several else "mean")
        self._step_loss = torch.zeros_like(self._step_loss)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> AdapterMetadata:
        """What a checkpoint or an adapter of this model must agree with."""
        return AdapterMetadata.of(
            self.language_model, self.lora, self.label_set, self.temperatures, self.instruction, self.keep
        )

    def _trained(self) -> set[str]:
        return {f"model.{name}" for name in language_model.trainable_names(self._model)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only, and what they belong to."""
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["medlit"] = self.structure.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model; take over the label names and, in a fit, the place to go on from.

        Raises:
            UserError: base model, adapter or labels are not the checkpoint's.
        """
        self._adopt(AdapterMetadata.from_dict(checkpoint.get("medlit")), "the checkpoint")
        if (file := metadata_of_weights(self.trainer.ckpt_path, None)) is not None:
            self.temperatures |= AdapterMetadata.read(file).temperatures
        keys = set(checkpoint["state_dict"])
        if keys != self._trained():
            raise UserError(
                f"ckpt_path: the checkpoint's {len(keys)} weights are not this model's {len(self._trained())} trained"
                " ones; use the config that it was trained with."
            )
        if self.trainer.training:
            check_groups(checkpoint, self.optimizer_settings)
            trainer, steps_per_epoch = self.trainer, self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
            micro_batches = trainer.accumulate_grad_batches
            validate_every = max(1, int(trainer.val_check_interval or 0) // micro_batches)
            last = last_step(trainer.max_steps, trainer.max_epochs, steps_per_epoch)
            repair_progress(checkpoint, steps_per_epoch, micro_batches, validate_every, last)

    def _adopt(self, theirs: AdapterMetadata, where: str) -> None:
        check_metadata(ours=self.structure, theirs=theirs, where=where)
        self.label_set = LabelSet(tuple(theirs.labels))
        self.temperatures = dict(theirs.temperatures)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter for PEFT, with tokenizer and label names, into an existing folder."""
        adapters.save_adapter(self._model, folder, self.language_model.base_model, self.language_model.revision)  # type: ignore[arg-type]
        self.tokenizer.save_pretrained(folder)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        notes: DataFingerprint | None = data.data_fingerprint
        content = self.structure.to_dict() | {"data": None if notes is None else notes.to_dict()}
        content[KEY] = Conditions.of(self.language_model, data.max_response_tokens).to_dict()
        write_json(folder / LABELS_FILE, content)
