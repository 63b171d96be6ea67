"""SpecialtyClassifier: the LightningModule around the language model."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medlit.base_model import load_tokenizer
from medlit.data.collate import Batch, EvalBatch, Prompts
from medlit.data.labels import LabelSet
from medlit.data.prompt import INSTRUCTION, PROMPTS
from medlit.errors import UserError
from medlit.evaluation.metrics import LOGGED
from medlit.evaluation.results import Results
from medlit.evaluation.sets import calibrate, sets_report
from medlit.model.adapter import adapter_folder, load_adapter, read_metadata
from medlit.model.adapter_metadata import AdapterMetadata, check_metadata, read_fitted
from medlit.model.decoding import Answers, Decoder, apply_temperature, make_decoder
from medlit.model.language_model import inference_mode, loss_sum, make_recomputation, train_mode, trainable_names
from medlit.model.loading import load_model
from medlit.model.memory import Recomputation
from medlit.model.metrics import Scores, SpecialtyMetrics, batch_results, gather_results, label_ids, same_spelling
from medlit.model.optimizer import apply_settings, make_optimizer, make_schedule
from medlit.model.prior import TokenPrior
from medlit.model.settings import Decoding, LanguageModel, Lora, Optimizer


class SpecialtyClassifier(L.LightningModule):
    """Trains a 4-bit language model to answer with a note's specialty, and evaluates what it really answers.

    Args:
        language_model: the frozen base model.
        lora: the adapter that is trained; null: the bare base model.
        optimizer: AdamW with 8-bit state and its learning-rate schedule.
        decoding: how the model answers.
        adapter: start from this adapter, a folder or a Hub id; its settings replace defaults of model.lora.
        instruction: set from data.instruction.
        mask_prompt: set from data.mask_prompt.
        max_response_tokens: set from data.max_response_tokens.

    Attributes:
        model: the language model with its adapter, once it is loaded.
        label_set: the K labels, once they are known.
        metrics: counts of the evaluation that is running.
        scores, results, sets: of the last evaluation; results are note by note, sets are empty where none are made.
        temperature: divides log-probabilities in test and predict; fitted by validate, and by a fit with sets or prior.
        prior: of the labels, from a fit with `Decoding.prior`; a fit itself uses none.
        thresholds: of sets, by `Decoding.sets`; fitted with the temperature.
        recomputation: chooses the layers to recompute, once a fit has started.
    """

    def __init__(
        self,
        language_model: LanguageModel = LanguageModel(),  # noqa: B008 - defaults that the command line can show
        lora: Lora = Lora(),  # noqa: B008
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        decoding: Decoding = Decoding(),  # noqa: B008
        adapter: str | None = None,
        instruction: str = INSTRUCTION,
        mask_prompt: bool = True,
        max_response_tokens: int = 32,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.lora: Lora | None = lora
        self.optimizer_settings = optimizer
        self.decoding = decoding
        self.adapter = adapter
        self.instruction, self.mask_prompt = instruction, mask_prompt
        self.max_response_tokens = max_response_tokens
        self.model: nn.Module | None = None
        self.label_set = LabelSet(())
        self.metrics = SpecialtyMetrics(self.label_set)
        self.eval_loss = MeanMetric().set_dtype(torch.float64)
        self.scores: Scores | None = None
        self.results: Results | None = None
        self.temperature: float | None = None
        self.thresholds: dict[str, float] = {}
        self.prior: TokenPrior | None = None
        self.sets: dict[str, Any] = {}
        self.recomputation: Recomputation | None = None
        self._trained = False  # since then what an adapter's file holds is not fitted to these weights
        self.strict_loading = False  # checkpoints hold the trained weights only; `on_load_checkpoint` compares the keys

    def setup(self, stage: str) -> None:
        """Take labels and what is fitted from the adapter's metadata, if there is an adapter that medlit wrote."""
        if stage == "fit":  # what an earlier evaluation has fitted or read does not belong to the new weights
            self._trained, self.temperature, self.thresholds, self.prior = True, None, {}, None
        if self.adapter is not None:
            folder = adapter_folder(self.adapter)
            if (metadata := read_metadata(folder, self.language_model.base_model)) is not None:
                self._adopt(metadata, f"the adapter {folder}")
                if not self._trained:
                    self.temperature, self.thresholds, self.prior = read_fitted(None, folder, self.decoding)

    def configure_model(self) -> None:
        """Load the base model and its adapter; Lightning calls this after `setup`, before it reads a checkpoint."""
        if self.model is not None:
            return
        self.tokenizer = load_tokenizer(self.language_model.base_model, self.language_model.revision)
        self.model = load_model(self.language_model, self.lora, self.trainer.strategy.root_device)
        if self.adapter is not None:
            load_adapter(self.model, adapter_folder(self.adapter))  # type: ignore[arg-type]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW8bit over the adapter, with one learning rate per optimizer step."""
        optimizer = make_optimizer(self, self.optimizer_settings)
        schedule = make_schedule(optimizer, self.optimizer_settings, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Switch to training mode: the loader leaves evaluation mode, and Lightning does not undo that."""
        train_mode(self._model, self.language_model)
        self.recomputation = make_recomputation(self._model, self.language_model, self.lora)
        self._step_loss = torch.zeros((), device=self.device)

    def on_train_start(self) -> None:
        """Let the current settings override what the checkpoint's optimizer and schedule were restored with."""
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        apply_settings(optimizer, schedule, self.optimizer_settings)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout, LoRA's and the base model's, by step, micro-batch and rank: a resumed fit draws the same."""
        if self.lora is not None:
            place = [self.lora.seed, self.global_step, batch_idx, self.trainer.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This micro-batch's share of the optimizer step's mean loss over supervised tokens, in nats."""
        share = loss_sum(self._model, batch, self.recomputation) / batch.step_tokens
        self._step_loss += share.detach()
        # Lightning divides by the micro-batches of a step and DDP by the processes; the share is exact without either.
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss of the whole step, once, without synchronising with the device."""
        several = self.trainer.world_size > 1
        self.log("train/loss", self._step_loss, sync_dist=several, reduce_fx="sum" if several else "mean")
        self._step_loss = torch.zeros_like(self._step_loss)

    def on_validation_model_eval(self) -> None:
        """Switch to inference mode."""
        inference_mode(self._model)

    def on_validation_model_train(self) -> None:
        """Switch back to training mode, gradient checkpointing included."""
        # Unsloth switches checkpointing off for generation, and back on only if the model was training when generation
        # began, which it never is under Lightning's validation.
        train_mode(self._model, self.language_model)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and build the decoder for the current weights and labels."""
        self.metrics = SpecialtyMetrics(self.label_set).to(self.device)
        self.eval_loss.reset()
        self._batch_results: list[Results] = []
        self._decoder = self.build_decoder(self.decoding, self.prior)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Answers]:
        """Answer B notes and count the answers."""
        answers = self._decoder(batch.prompts)
        accepted = label_ids(batch, self.label_set)
        labels, tokens = accepted[:, 0], batch.loss.step_tokens
        self.eval_loss.update(self._loss_sum(batch, answers, labels).double() / tokens, tokens)
        if self.trainer.testing:
            answers = apply_temperature(answers, self.temperature)
        self.metrics.update(*(ids.to(self.device) for ids in (answers.label_ids, labels, accepted)))
        self._batch_results.append(batch_results(batch, accepted, answers, self.label_set))
        return {"answers": answers}

    def on_validation_epoch_end(self) -> None:
        """Compute and log the metrics; `medlit validate` fits the temperature and the thresholds of sets."""
        self.scores, self.results = self.metrics.scores(), gather_results(self._batch_results)
        fits = self.trainer.state.fn == "validate" or (self.decoding.sets and not self.trainer.testing)
        if fits and self.results.probabilities is not None:
            power = 1.0 if self.prior is None else self.prior.power
            self.temperature, self.thresholds = calibrate(self.results, self.decoding.coverage, power)
        temperature = 1.0 if self.trainer.testing else self.temperature or 1.0  # a test has applied it
        self.sets = sets_report(self.results, temperature, self.thresholds, self.decoding.sets)
        values: dict[str, Any] = {**self.scores, "loss": float(self.eval_loss.compute())}
        logged = {f"{self.stage}/{name}": float(values[name]) for name in LOGGED}
        self.log_dict(logged, prog_bar=not self.trainer.testing)
        self.log_dict({f"{self.stage}/set_{name}": v for name, v in self.sets.items() if isinstance(v, float)})

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval
    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_start(self) -> None:
        """Build the decoder."""
        self._decoder = self.build_decoder(self.decoding, self.prior)

    def predict_step(self, batch: Prompts, batch_idx: int) -> Answers:
        """Answer B notes."""
        return apply_temperature(self._decoder(batch), self.temperature)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only, with their metadata."""
        trained = self._trained_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["medlit"] = self.metadata.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adopt a checkpoint's labels and temperature; a UserError for another base model, adapter or labels."""
        self._adopt(AdapterMetadata.from_dict(checkpoint.get("medlit")), "the checkpoint")
        if not self.trainer.training:
            self.temperature, self.thresholds, self.prior = read_fitted(self.trainer.ckpt_path, None, self.decoding)
        keys, trained = set(checkpoint["state_dict"]), self._trained_keys()
        if keys != trained:
            raise UserError(
                f"ckpt_path: the checkpoint's {len(keys)} weights are not this model's {len(trained)} trained ones;"
                " use the config that it was trained with."
            )

    @property
    def stage(self) -> str:
        """First half of a metric's tag: `val` in a fit, else the verb, `validate` or `test`."""
        return "val" if self.trainer.state.fn == "fit" else str(self.trainer.state.fn.value)  # type: ignore[union-attr]

    @property
    def metadata(self) -> AdapterMetadata:
        """What a checkpoint or an adapter of this model must match."""
        return AdapterMetadata.of(
            self.language_model, self.lora, self.label_set, self.instruction, self.max_response_tokens
        )

    def build_decoder(self, decoding: Decoding, prior: TokenPrior | None) -> Decoder:
        """A decoder of the current weights and labels."""
        base, tokens = self.language_model, self.max_response_tokens
        prompt = PROMPTS[base.prompt_format](self.tokenizer, self.instruction, base.max_length, tokens)
        return make_decoder(decoding, self._model, prompt, self.label_set, prior)

    def _adopt(self, metadata: AdapterMetadata, source: str) -> None:
        check_metadata(ours=self.metadata, theirs=metadata, source=source)
        self.label_set = LabelSet(tuple(metadata.labels))

    def _loss_sum(self, batch: EvalBatch, answers: Answers, labels: Tensor) -> Tensor:
        """Summed negative log-likelihood of the supervised tokens, shape (), in nats."""
        if self.mask_prompt and answers.label_nats is not None and same_spelling(batch, labels, self.label_set):
            return -answers.label_nats.gather(1, labels[:, None]).sum().to(self.device)  # no second pass over the notes
        with torch.no_grad():
            return loss_sum(self._model, batch.loss)

    def _trained_keys(self) -> set[str]:
        return {f"model.{name}" for name in trainable_names(self._model)}

    @property
    def _model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("configure_model has not run")
        return self.model
