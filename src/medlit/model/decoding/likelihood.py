"""Answers with a probability for each label, and the decoders that stay on the list of labels.

The nodes of the label trie follow the prompt together in one more pass: each attends to the prompt, to the nodes that
lead to it and to itself, so its hidden state is what the model would have after reading that beginning of a label.

B notes, T prompt tokens, N nodes, E edges, K labels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.evaluation.results import FloatArray
from medlit.model.decoding.kv_cache import Prefix, read_prompts
from medlit.model.decoding.trie import ROOT, TokenTrie
from medlit.model.head import head_logits

_LOGIT_ROWS = 512  # rows of logits held at once: 512 x 128,256 in float32 are 250 MiB


class Answers(NamedTuple):
    """A batch of answers, on the host."""

    label_ids: Tensor  # 0 .. K-1, or K for an answer that is not a label, (B,) int64
    texts: list[str]  # raw answers, special tokens removed, B of them
    probabilities: Tensor | None = None  # of the K labels, (B, K) float32, rows sum to 1; None from `generate`
    # scores whose softmax the probabilities are, in nats, (B, K) float32 or float64; None where there are none.
    log_likelihoods: Tensor | None = None
    # log-likelihood of each label with its EOS, in nats, (B, K) float32; None where the labels were not scored.
    label_nats: Tensor | None = None


def apply_temperature(answers: Answers, temperature: float | None) -> Answers:
    """The same answers with their probabilities at a temperature; None leaves them."""
    if temperature is None or answers.log_likelihoods is None:
        return answers
    scaled = answers.log_likelihoods.double() / temperature
    return answers._replace(probabilities=scaled.softmax(dim=1).float(), log_likelihoods=scaled)


def apply_prior(answers: Answers, prior: FloatArray, names: tuple[str, ...]) -> Answers:
    """The same notes answered by the language model's probabilities times a prior, given as its logarithm, (B, K)."""
    assert answers.log_likelihoods is not None
    scores = answers.log_likelihoods.double().log_softmax(dim=1) + torch.from_numpy(prior)
    return _answers(scores.argmax(dim=1), scores, answers.label_nats, names)


def _answers(label_ids: Tensor, scores: Tensor, label_nats: Tensor | None, names: tuple[str, ...]) -> Answers:
    """These labels as answers, with the scores of all K labels, (B, K)."""
    texts = [names[label] for label in label_ids.tolist()]
    return Answers(label_ids, texts, scores.softmax(dim=1).float(), scores, label_nats)


class LabelScorer:
    """Scores the edges of the label trie after prompts."""

    def __init__(self, model: nn.Module, trie: TokenTrie) -> None:
        self.model = model
        self.trie = trie
        # Each node's ancestors and the node itself, which fills the row up, (N, depth): as a mask, (N, N), the nodes of
        # thousands of labels would take gigabytes.
        ancestors = [trie.ancestors(node) for node in range(len(trie))]
        self.ancestors = _rectangle(ancestors, None)
        self.depths = torch.tensor([len(path) - 1 for path in ancestors], dtype=torch.long)
        self.path_edges = _rectangle(trie.paths, len(trie.edges))  # (K, longest), filled up with an edge of no value
        self.tokens = torch.tensor(trie.tokens, dtype=torch.long)
        self.edge_nodes = torch.tensor([node for node, _ in trie.edges], dtype=torch.long)  # E
        self.edge_tokens = torch.tensor([token for _, token in trie.edges], dtype=torch.long)  # E

    def hidden(self, cache: Prefix, nodes: Tensor) -> Tensor:
        """Hidden states after B prompts and n nodes, ascending and with all their ancestors, (B, n, D)."""
        device = cache.lengths.device
        attends = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)  # of each node (row) it and its ancestors
        attends.scatter_(1, torch.searchsorted(nodes, self.ancestors[nodes]), True)
        tokens, depths = self.tokens[nodes].to(device), self.depths[nodes].to(device)
        return cache.look_ahead(tokens, depths, attends.to(device))

    def edges(self, cache: Prefix) -> Tensor:
        """Log-probability of each edge's token after its node, over the whole vocabulary, (B, E) float32 in nats."""
        scores = cache.last.new_empty(len(cache.last), len(self.trie.edges), dtype=torch.float32)
        self._score(scores, torch.tensor([ROOT]), cache.last[:, None])
        for part in self._passes(cache.mask.shape[1]):
            nodes = self.ancestors[part].unique()  # type: ignore[no-untyped-call]
            hidden = self.hidden(cache, nodes)
            self._score(scores, part, hidden[:, torch.isin(nodes, part)])
        return scores

    def edges_at(self, hidden: Tensor) -> Tensor:
        """The same as `edges`, from hidden states that exist already: the root's, then each node's, (B, 1 + N, D)."""
        scores = hidden.new_empty(len(hidden), len(self.trie.edges), dtype=torch.float32)
        for part in torch.split(torch.arange(ROOT, len(self.trie)), _LOGIT_ROWS):
            self._score(scores, part, hidden[:, (part + 1).to(hidden.device)])
        return scores

    def paths(self, values: Tensor) -> Tensor:
        """Sum of each label's edges: (B, E) -> (B, K)."""
        return nn.functional.pad(values, (0, 1))[:, self.path_edges.to(values.device)].sum(dim=2)

    def among_siblings(self, scores: Tensor) -> Tensor:
        """Log-probability of each edge among those that leave the same node: (B, E) -> (B, E)."""
        node = (self.edge_nodes - ROOT).to(scores.device).expand(len(scores), -1)
        nothing = scores.new_zeros(len(scores), 1 + len(self.trie))
        top = nothing.scatter_reduce(1, node, scores, "amax", include_self=False).gather(1, node)
        return scores - top - nothing.scatter_add(1, node, (scores - top).exp()).gather(1, node).log()

    def _passes(self, width: int) -> list[Tensor]:
        """Nodes of one pass each; with their ancestors no more than the prompts have columns, to bound the memory."""
        nodes = torch.arange(len(self.trie))
        deepest = int(self.depths.max()) + 1 if len(nodes) else 0
        most = min(width, _LOGIT_ROWS)
        size = len(nodes) if len(nodes) <= most else max(1, most - deepest)
        return list(torch.split(nodes, size)) if len(nodes) else []

    def _score(self, scores: Tensor, nodes: Tensor, hidden: Tensor) -> None:
        """Fill in the edges that leave some nodes, given the hidden states after these, (B, n, D)."""
        device = hidden.device
        edges = torch.isin(self.edge_nodes, nodes).nonzero()[:, 0]
        at = torch.searchsorted(nodes, self.edge_nodes[edges]).to(device)  # each edge's node, as an index into `nodes`
        tokens = self.edge_tokens[edges].to(device)
        rows = max(1, _LOGIT_ROWS // len(nodes))
        for part, of in zip(torch.split(hidden, rows), torch.split(scores, rows), strict=True):
            with torch.no_grad():
                logits = head_logits(self.model, part.flatten(0, 1)).view(*part.shape[:2], -1)  # (b, n, V)
            of[:, edges.to(device)] = logits[:, at, tokens] - logits.logsumexp(dim=-1)[:, at]


def _rectangle(rows: Sequence[Sequence[int]], value: int | None) -> Tensor:
    """Rows filled up to one length, with a value or with their last number, (rows, longest) int64."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[row[-1] if value is None else value] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long).view(len(rows), width)


def _on_host(nats: Tensor, prompts: Prompts) -> Tensor:
    """Log-likelihoods of B notes on the host, where sums have one order; a UserError if one is no number."""
    nats = nats.cpu()
    if places := nats.softmax(dim=1).isnan().any(dim=1).nonzero()[:, 0].tolist():  # also if all are -inf
        raise UserError(
            f"model.language_model.dtype: numbers overflow for note {prompts.ids[places[0]]}; set it to 'float32' and"
            " trainer.precision to '32-true' or, if they are, use other weights."
        )
    return nats


@dataclass(frozen=True)
class Likelihood:
    """The label whose answer is most likely: log-likelihood of every label with its EOS, and their softmax."""

    scorer: LabelScorer
    label_set: LabelSet

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        nats = _on_host(self.scorer.paths(self.scorer.edges(read_prompts(self.scorer.model, prompts))), prompts)
        return _answers(nats.argmax(dim=1), nats, nats, self.label_set.names)


@dataclass(frozen=True)
class Constrained:
    """Greedy decoding along the trie: at every token the most likely one that can still lead to a label.

    Its probabilities are those of sampling in the same way: the product, over a label's tokens, of the token's
    probability among those that can still lead to a label. They sum to 1; the greedy answer need not be the label with
    the highest one, which is what `Likelihood` answers.
    """

    scorer: LabelScorer
    label_set: LabelSet

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        scorer = self.scorer
        over_vocabulary = _on_host(scorer.edges(read_prompts(scorer.model, prompts)), prompts)
        edges = scorer.among_siblings(over_vocabulary)
        return _answers(self._walk(edges), scorer.paths(edges), scorer.paths(over_vocabulary), self.label_set.names)

    def _walk(self, edges: Tensor) -> Tensor:
        """The label at the end of each row's most likely edges, (B,) int64."""
        open_ = torch.ones(len(edges), len(self.label_set), dtype=torch.bool)
        paths = self.scorer.trie.paths
        for step in range(max(map(len, paths))):
            # The edge that each label takes here; all labels that are still open leave the same node.
            taken = torch.tensor([path[min(step, len(path) - 1)] for path in paths])
            value = edges[:, taken].masked_fill(~open_, -torch.inf)
            best = taken[value.argmax(dim=1)]
            open_ &= taken == best[:, None]
        return open_.int().argmax(dim=1)
