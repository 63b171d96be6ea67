"""What every decoder returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from medlit.evaluation.calibration import at_temperature
from medlit.evaluation.results import FloatArray


class Answers(NamedTuple):
    """A batch of answers, on the host."""

    label_ids: Tensor  # 0 .. K-1, or K for an answer that is not a label, (B,) int64
    texts: list[str]  # raw answers, special tokens removed, B of them
    probabilities: Tensor | None = None  # of the K labels, (B, K) float32, rows sum to 1; None from `generate`
    # scores whose softmax over labels the probabilities are, in nats, (B, K) float32; None where there are no
    # probabilities.
    log_likelihoods: Tensor | None = None
    # log-likelihood of each label with its EOS, in nats, (B, K) float32; None where the labels were not scored.
    label_nats: Tensor | None = None


def apply_temperature(answers: Answers, temperature: float | None) -> Answers:
    """The same answers with their probabilities at a temperature; None leaves them."""
    if temperature is None or answers.probabilities is None:
        return answers
    scaled = at_temperature(answers.probabilities.double().cpu().numpy(), temperature)
    return answers._replace(probabilities=torch.from_numpy(scaled).float())


def apply_prior(answers: Answers, prior: FloatArray, names: tuple[str, ...]) -> Answers:
    """The same notes answered by the language model's probabilities times a prior, given as its logarithm, (B, K)."""
    assert answers.log_likelihoods is not None
    scores = answers.log_likelihoods.double().log_softmax(dim=1) + torch.from_numpy(prior)
    label_ids = scores.argmax(dim=1)
    texts = [names[label] for label in label_ids.tolist()]
    return answers._replace(
        label_ids=label_ids, texts=texts, probabilities=scores.softmax(dim=1).float(), log_likelihoods=scores.float()
    )
