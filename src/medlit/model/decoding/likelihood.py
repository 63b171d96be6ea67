"""The label whose answer is likeliest, with the probability of each."""

from __future__ import annotations

import torch
from torch import Tensor

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.model.decoding.answers import Answers
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.label_scorer import LabelScorer


class Likelihood:
    """The exact log-likelihood of every label with its EOS, and the softmax of these over the labels.

    Args:
        scorer: reads the labels.
        label_set: the K labels.
        length_normalise: the mean over a label's tokens instead of their sum, which favours no label for being short.
        content_free: prompts that say nothing, whose mean probabilities every note's are divided by: contextual
            calibration (Zhao 2021, arXiv 2102.09690); None leaves that out.
    """

    def __init__(
        self,
        scorer: LabelScorer,
        label_set: LabelSet,
        length_normalise: bool = False,
        content_free: Prompts | None = None,
    ) -> None:
        self.scorer = scorer
        self.label_set = label_set
        self.length_normalise = length_normalise
        self.bias = torch.zeros(1, len(label_set))
        if content_free is not None:
            self.bias = self._scores(self._nats(content_free)).softmax(dim=1).mean(dim=0, keepdim=True).log()

    def _nats(self, prompts: Prompts) -> Tensor:
        """Log-likelihood of each label, (B, K) float32, on the host."""
        return self.scorer.paths(self.scorer.edges(read_prompts(self.scorer.model, prompts))).cpu()

    def _scores(self, nats: Tensor) -> Tensor:
        """What labels are compared by, (B, K)."""
        return nats / torch.tensor([len(path) for path in self.scorer.trie.paths]) if self.length_normalise else nats

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        nats = self._nats(prompts)
        scores = self._scores(nats) - self.bias
        label_ids = scores.argmax(dim=1)
        texts = [self.label_set.names[label] for label in label_ids.tolist()]
        return Answers(label_ids, texts, scores.softmax(dim=1), scores, nats)
