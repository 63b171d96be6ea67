"""SpecialtyClassifier: the LightningModule around the language model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from medlit.data.batches import Batch, EvalBatch, Prompts
from medlit.data.provenance import Provenance
from medlit.errors import UserError
from medlit.evaluation.answered import Answered
from medlit.evaluation.calibration import fit_temperature
from medlit.labels import LabelSet
from medlit.model import backbone as language_model
from medlit.model.decoding import Answers, Decoder, make_decoder
from medlit.model.metrics import Scores, SpecialtyMetrics
from medlit.model.records import gather, record, tempered
from medlit.model.resume import count_in_steps, last_step
from medlit.model.settings import Backbone, Decoding, Lora, Optimizer
from medlit.model.structure import LABELS_FILE, Structure, check_structure
from medlit.model.temperature import measured_adapter, way_of_answering
from medlit.weights import load_tokenizer

# Metric tags, `stage/name`; test metrics are the same with `test`.
TRAIN_LOSS = "train/loss"
LOSS, ACCURACY, F1_MACRO, F1_WEIGHTED, INVALID_RATE = "loss", "accuracy", "f1_macro", "f1_weighted", "invalid_rate"


class SpecialtyClassifier(L.LightningModule):
    """Teaches a 4-bit language model to answer with a note's specialty, and counts what it really answers.

    Args:
        backbone: the frozen base model.
        lora: the adapter that is trained.
        optimizer: AdamW with 8-bit state and its schedule.
        decoding: how the model answers.
        adapter: start from this adapter, a folder or a Hub id; its r, alpha and targets must be those of 'lora'.
            'none' is the bare base model.
    """

    def __init__(
        self,
        backbone: Backbone = Backbone(),  # noqa: B008 - defaults that the command line can show
        lora: Lora = Lora(),  # noqa: B008
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        decoding: Decoding = Decoding(),  # noqa: B008
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.lora = lora
        self.optimizer_settings = optimizer
        self.decoding = decoding
        self.adapter = None if adapter == "none" else adapter
        self.model: nn.Module | None = None
        self.label_set = LabelSet(())
        self.scores: Scores | None = None
        self.answered: Answered | None = None  # the last evaluation, note by note
        self.temperatures: dict[str, float] = {}
        self._decoder: Decoder | None = None
        self.strict_loading = False  # a checkpoint holds the trained weights only; `on_load_checkpoint` compares keys

    def plain_settings(self) -> dict[str, Any]:
        """The settings as plain types, for a table of hyperparameters."""
        return {
            "backbone": asdict(self.backbone),
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
            folder = language_model.adapter_folder(self.adapter)
            file = folder / LABELS_FILE
            if file.is_file():
                self._adopt(Structure.read(file), f"the adapter {folder}")
                if stage != "fit":  # an adapter may well be trained on with other notes
                    self.trainer.datamodule.compare_notes(Provenance.read(file), f"the adapter {folder}")  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Load the base model and its adapter; Lightning calls this after `setup`, before a checkpoint is read."""
        if self.model is not None:
            return
        self.tokenizer = load_tokenizer(self.backbone.base_model, self.backbone.revision)
        self.model = language_model.load(self.backbone, self.lora, self.trainer.strategy.root_device)
        if self.adapter is not None:
            language_model.load_adapter(self.model, language_model.adapter_folder(self.adapter))  # type: ignore[arg-type]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW8bit over the adapter; linear warm-up, then linear decay to the last optimizer step."""
        from bitsandbytes.optim import AdamW8bit

        settings = self.optimizer_settings
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW8bit(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The loader leaves evaluation mode, and Lightning does not undo that; new weights have no temperature yet."""
        self.temperatures = {}
        language_model.train_mode(self._model, self.backbone)
        self._recomputation = language_model.recomputation(self._model, self.backbone, self.lora)
        self._step_loss = torch.zeros((), device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw dropout from the step and the micro-batch's place: a fit that goes on draws what it would have drawn."""
        if self.lora.dropout:
            place = [self.lora.seed, self.global_step, batch_idx, self.trainer.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This micro-batch's share of the optimizer step's mean loss over supervised tokens, in nats."""
        share = language_model.loss_sum(self._model, batch, self._recomputation) / batch.step_tokens
        self._step_loss += share.detach()
        # Lightning divides by the micro-batches of a step and DDP by the processes; the share is exact without either.
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the whole step's loss, once, without waiting for the device."""
        several = self.trainer.world_size > 1
        self.log(TRAIN_LOSS, self._step_loss, prog_bar=True, sync_dist=several, reduce_fx="sum" if several else "mean")
        self._step_loss = torch.zeros_like(self._step_loss)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Count afresh."""
        self._metrics = SpecialtyMetrics(self.label_set).to(self.device)
        self._loss = torch.zeros(2, device=self.device, dtype=torch.float64)  # summed nats, supervised tokens
        self._records: list[Answered] = []

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Answers]:
        """Let the model answer, and measure the loss on the true answers."""
        answers = self._answer(batch.prompts)
        nats = self._nats(batch, answers)
        self._loss += torch.stack([nats.double(), torch.full_like(nats, batch.loss.step_tokens, dtype=torch.float64)])
        if self.trainer.testing:
            answers = tempered(answers, self.temperature)
        self._records.append(record(batch, answers, self.label_set))
        targets = torch.tensor([self.label_set.index(name) for name in batch.specialties], device=self.device)
        self._metrics.update(answers.label_ids.to(self.device), targets)
        return {"answers": answers}

    def _nats(self, batch: EvalBatch, answers: Answers) -> Tensor:
        """Summed negative log-likelihood of the supervised tokens, shape (), on the device.

        A decoder that has read the labels behind the notes knows it already: the notes need no second pass.
        """
        if answers.label_nats is not None and self.trainer.datamodule.loss_on == "response":  # type: ignore[attr-defined]
            true = torch.tensor([[self.label_set.index(name)] for name in batch.specialties])
            return -answers.label_nats.gather(1, true).sum().to(self.device)
        with torch.no_grad():
            return language_model.loss_sum(self._model, batch.loss)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's numbers on the board."""
        self.scores = self._metrics.scores()
        self.answered = gather(self._records)
        if not self.trainer.testing and self.answered.probabilities is not None:
            found = fit_temperature(self.answered.probabilities, self.answered.truth)
            self.temperatures[way_of_answering(self.decoding)] = found
        nats, tokens = self.trainer.strategy.reduce(self._loss, reduce_op="sum").tolist()
        numbers = {
            LOSS: nats / max(tokens, 1),
            ACCURACY: self.scores["accuracy"],
            F1_MACRO: self.scores["f1_macro"],
            F1_WEIGHTED: self.scores["f1_weighted"],
            INVALID_RATE: self.scores["invalid_rate"],
        }
        # Already of all processes together: every process logs the same.
        self.log_dict({f"{self.stage}/{name}": value for name, value in numbers.items()}, prog_bar=self.stage == "val")

    @property
    def temperature(self) -> float | None:
        """What a validation found for this way of answering; test and predict divide log-probabilities by it."""
        return self.temperatures.get(way_of_answering(self.decoding))

    @property
    def stage(self) -> str:
        """First half of a metric's tag: `val` or `test`."""
        return "test" if self.trainer.testing else "val"

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Prompts, batch_idx: int) -> Answers:
        """Answer B notes."""
        return tempered(self._answer(batch), self.temperature)

    def _answer(self, prompts: Prompts) -> Answers:
        if self._decoder is None:
            prompt = self.trainer.datamodule.prompt  # type: ignore[attr-defined]
            self._decoder = make_decoder(self.decoding, self._model, prompt, self.label_set, self.device)
        return self._decoder(prompts)

    # Unsloth switches checkpointing off for generation and back on only if the model was training when it began, which
    # under Lightning's validation it never is.

    def on_validation_model_eval(self) -> None:
        """Ready to answer, with the weights and labels of now."""
        language_model.answer_mode(self._model)
        self._decoder = None

    def on_validation_model_train(self) -> None:
        """Ready to train again, gradient checkpointing included."""
        language_model.train_mode(self._model, self.backbone)

    on_test_model_eval = on_validation_model_eval
    on_predict_model_eval = on_validation_model_eval

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """What a checkpoint or an adapter of this model must agree with."""
        return Structure.of(self.backbone, self.lora, self.label_set, self.temperatures)

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
        self._adopt(Structure.from_dict(checkpoint.get("medlit")), "the checkpoint")
        if (file := measured_adapter(self.trainer.ckpt_path, None)) is not None:
            self.temperatures |= Structure.read(file).temperatures
        keys = set(checkpoint["state_dict"])
        if keys != self._trained():
            raise UserError(
                f"ckpt_path: the checkpoint's {len(keys)} weights are not this model's {len(self._trained())} trained"
                " ones; use the config that it was trained with."
            )
        if self.trainer.training:
            trainer, steps_per_epoch = self.trainer, self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
            micro_batches = trainer.accumulate_grad_batches
            validate_every = max(1, int(trainer.val_check_interval or 0) // micro_batches)
            last = last_step(trainer.max_steps, trainer.max_epochs, steps_per_epoch)
            count_in_steps(checkpoint, steps_per_epoch, micro_batches, validate_every, last)

    def _adopt(self, theirs: Structure, where: str) -> None:
        check_structure(ours=self.structure, theirs=theirs, where=where)
        self.label_set = LabelSet(tuple(theirs.labels))
        self.temperatures = dict(theirs.temperatures)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter for PEFT, with tokenizer and label names, into an existing folder."""
        language_model.save_adapter(self._model, folder, self.backbone.base_model, self.backbone.revision)  # type: ignore[arg-type]
        self.tokenizer.save_pretrained(folder)
        notes: Provenance | None = self.trainer.datamodule.provenance  # type: ignore[attr-defined]
        content = self.structure.to_dict() | {"data": None if notes is None else notes.to_dict()}
        (folder / LABELS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def _model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("configure_model has not run")
        return self.model
