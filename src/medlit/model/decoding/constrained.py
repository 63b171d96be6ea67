"""Greedy decoding along the trie of labels: at every token the likeliest that keeps the answer on the list."""

from __future__ import annotations

import torch
from torch import Tensor

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.model.decoding.answers import Answers
from medlit.model.decoding.kv_cache import read_prompts
from medlit.model.decoding.label_scorer import LabelScorer


class Constrained:
    """Greedy answers that are always on the list.

    Its probabilities are those of this way to answer, drawn instead of taken greedily: the product, over a label's
    tokens, of the token's probability among those that keep the answer on the list. They sum to 1; the answer need not
    be the label that has the most, which is what `likelihood` is for.

    Args:
        scorer: reads the labels.
        label_set: the K labels.
    """

    def __init__(self, scorer: LabelScorer, label_set: LabelSet) -> None:
        self.scorer = scorer
        self.label_set = label_set

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        scorer = self.scorer
        every = scorer.edges(read_prompts(scorer.model, prompts))
        edges = scorer.among_siblings(every)
        label_ids = self._walk(edges.cpu())
        scores = scorer.paths(edges).cpu()
        texts = [self.label_set.names[label] for label in label_ids.tolist()]
        return Answers(label_ids, texts, scores.softmax(dim=1), scores, scorer.paths(every).cpu())

    def _walk(self, edges: Tensor) -> Tensor:
        """The label at the end of each row's likeliest edges, (B,) int64."""
        open_ = torch.ones(len(edges), len(self.label_set), dtype=torch.bool)
        paths = self.scorer.trie.paths
        for step in range(max(map(len, paths))):
            # The edge that each label takes here; every label that is still open leaves the same node.
            taken = torch.tensor([path[min(step, len(path) - 1)] for path in paths])
            value = edges[:, taken].masked_fill(~open_, -torch.inf)
            best = taken[value.argmax(dim=1)]
            open_ &= taken == best[:, None]
        return open_.int().argmax(dim=1)
