"""The label whose answer is most likely, with the probability of each."""

from __future__ import annotations

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.model.decoding.answers import Answers
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.label_scorer import LabelScorer


class Likelihood:
    """The exact log-likelihood of every label with its EOS, and the softmax of these over the labels.

    Args:
        scorer: scores the labels.
        label_set: the K labels.
    """

    def __init__(self, scorer: LabelScorer, label_set: LabelSet) -> None:
        self.scorer = scorer
        self.label_set = label_set

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        nats = self.scorer.paths(self.scorer.edges(read_prompts(self.scorer.model, prompts))).cpu()
        label_ids = nats.argmax(dim=1)
        texts = [self.label_set.names[label] for label in label_ids.tolist()]
        return Answers(label_ids, texts, nats.softmax(dim=1), nats, nats)
