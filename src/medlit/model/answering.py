"""The half of the module that answers: validation, test and prediction, whatever the weights were trained by."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from medlit.data.collate import EvalBatch, Prompts
from medlit.data.labels import LabelSet
from medlit.evaluation.calibration import fit_temperature
from medlit.evaluation.results import Results
from medlit.model import language_model as language_model
from medlit.model.decoding import Answers, Decoder, make_decoder
from medlit.model.metrics import Scores
from medlit.model.records import apply_temperature
from medlit.model.settings import Decoding, LanguageModel
from medlit.model.tally import Tally
from medlit.model.temperature import decoding_key

# Metric tags, `stage/name`, with the stages `val` and `test`.
LOSS, ACCURACY, F1_MACRO, F1_WEIGHTED, INVALID_RATE = "loss", "accuracy", "f1_macro", "f1_weighted", "invalid_rate"


class AnsweringModule(L.LightningModule):
    """Lets a language model answer notes and counts what it really answers; validate and test share one step.

    Args:
        language_model: the frozen base model.
        decoding: how the model answers.

    Attributes:
        model: the language model with its adapter, once it is loaded.
        label_set: the K labels, once they are known.
        scores: the last evaluation's.
        answered: the last evaluation, note by note.
        temperatures: way of answering -> what the probabilities' logarithms are divided by.
    """

    def __init__(self, language_model: LanguageModel, decoding: Decoding) -> None:
        super().__init__()
        self.language_model = language_model
        self.decoding = decoding
        self.model: nn.Module | None = None
        self.label_set = LabelSet(())
        self.scores: Scores | None = None
        self.answered: Results | None = None
        self.temperatures: dict[str, float] = {}
        self._decoder: Decoder | None = None

    def on_validation_epoch_start(self) -> None:
        """Count afresh."""
        self._tally = Tally(self.label_set, self.device)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Answers]:
        """Let the model answer, and measure the loss on the true answers."""
        answers = self._answer(batch.prompts)
        nats = self._nats(batch, answers)
        if self.trainer.testing:
            answers = apply_temperature(answers, self.temperature)
        self._tally.add(batch, answers, nats)
        return {"answers": answers}

    def _nats(self, batch: EvalBatch, answers: Answers) -> Tensor:
        """Summed negative log-likelihood of the supervised tokens, shape (), on the device.

        A decoder that has read the labels behind the notes knows it already: the notes need no second pass. But it read
        them as the label set spells them, and the loss is of the table's own spelling.
        """
        as_listed = set(batch.specialties) <= set(self.label_set.names)
        on_response = self.trainer.datamodule.loss_on == "response"  # type: ignore[attr-defined]
        if answers.label_nats is not None and on_response and as_listed:
            true = torch.tensor([[self.label_set.index(name)] for name in batch.specialties])
            return -answers.label_nats.gather(1, true).sum().to(self.device)
        with torch.no_grad():
            return language_model.loss_sum(self._model, batch.loss)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's numbers on the board."""
        self.scores, self.answered, loss = self._tally.result(
            lambda x: self.trainer.strategy.reduce(x, reduce_op="sum")
        )
        probabilities = self.answered.probabilities
        if probabilities is not None and not (self.trainer.testing or self.trainer.sanity_checking):
            found = fit_temperature(probabilities, self.answered.truth)
            self.temperatures[decoding_key(self.decoding)] = found
        shown = (ACCURACY, F1_MACRO, F1_WEIGHTED, INVALID_RATE)
        numbers = {LOSS: loss, **{name: float(self.scores[name]) for name in shown}}  # type: ignore[literal-required]
        # Already of all processes together: every process logs the same.
        self.log_dict({f"{self.stage}/{name}": value for name, value in numbers.items()}, prog_bar=self.stage == "val")

    @property
    def temperature(self) -> float | None:
        """What a validation found for this way of answering; test and predict divide log-probabilities by it."""
        return self.temperatures.get(decoding_key(self.decoding))

    @property
    def stage(self) -> str:
        """First half of a metric's tag: `val` or `test`."""
        return "test" if self.trainer.testing else "val"

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Prompts, batch_idx: int) -> Answers:
        """Answer B notes."""
        return apply_temperature(self._answer(batch), self.temperature)

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
        language_model.train_mode(self._model, self.language_model)

    on_test_model_eval = on_validation_model_eval
    on_predict_model_eval = on_validation_model_eval

    @property
    def _model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("configure_model has not run")
        return self.model
