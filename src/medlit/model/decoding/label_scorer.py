"""The probability of every way through the trie of labels, for a batch of prompts that were computed once.

The trie's nodes follow the prompt all together in one more pass: each attends to the prompt, to the nodes that lead to
it and to itself, so its hidden state is what the model would have after reading that beginning of a label alone.

B notes, T prompt tokens, N nodes, E edges, K labels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medlit.model.decoding.kv_cache import Prefix, logits, look_ahead
from medlit.model.decoding.trie import ROOT, TokenTrie

# Rows of logits held at once: 512 x 128,256 in float32 are 250 MiB.
_LOGIT_ROWS = 512


class LabelScorer:
    """Reads the labels' trie behind prompts.

    Args:
        model: in answer mode.
        trie: the K labels, each with its EOS.
    """

    def __init__(self, model: nn.Module, trie: TokenTrie) -> None:
        self.model = model
        self.trie = trie
        n = len(trie)
        self.leads_to = torch.zeros(n, n, dtype=torch.bool)  # row: node, column: it and the nodes before it
        for node in range(n):
            self.leads_to[node, trie.ancestors(node)] = True
        self.tokens = torch.tensor(trie.tokens, dtype=torch.long)
        self.depths = torch.tensor(trie.depths, dtype=torch.long)
        self.leaving = torch.tensor([node for node, _ in trie.edges], dtype=torch.long)  # E
        self.taking = torch.tensor([token for _, token in trie.edges], dtype=torch.long)

    def hidden(self, prefix: Prefix, nodes: Tensor) -> Tensor:
        """Hidden states after some nodes, (B, n, D).

        Args:
            prefix: B prompts.
            nodes: with every node its ancestors, ascending, n of them.
        """
        device = prefix.lengths.device
        sees = self.leads_to[nodes][:, nodes]
        return look_ahead(
            self.model,
            prefix,
            self.tokens[nodes].to(device),
            self.depths[nodes].to(device),
            sees.to(device),
        )

    def edges_at(self, hidden: Tensor) -> Tensor:
        """The same as `edges`, from hidden states that were computed already: the root's, then each node's.

        Args:
            hidden: (B, 1 + N, D).
        """
        scores = hidden.new_empty(len(hidden), len(self.trie.edges), dtype=torch.float32)
        for part in torch.split(torch.arange(ROOT, len(self.trie)), _LOGIT_ROWS):
            self._take(scores, part, hidden[:, (part + 1).to(hidden.device)])
        return scores

    def edges(self, prefix: Prefix) -> Tensor:
        """Log-probability of each edge's token after its node, over the whole vocabulary, (B, E) float32 in nats."""
        scores = prefix.last.new_empty(len(prefix.last), len(self.trie.edges), dtype=torch.float32)
        self._take(scores, torch.tensor([ROOT]), prefix.last[:, None])
        for part in self._passes(prefix.read.shape[1]):
            nodes = self.leads_to[part].any(dim=0).nonzero()[:, 0]
            hidden = self.hidden(prefix, nodes)
            self._take(scores, part, hidden[:, torch.isin(nodes, part)])
        return scores

    def _passes(self, width: int) -> list[Tensor]:
        """Nodes of one pass each: with what leads to them no more than the prompts have columns.

        So a pass takes no more memory than the prompts did, whatever the number of labels.
        """
        nodes = torch.arange(len(self.trie))
        deepest = int(self.depths.max()) + 1 if len(nodes) else 0
        most = min(width, _LOGIT_ROWS)
        size = len(nodes) if len(nodes) <= most else max(1, most - deepest)
        return list(torch.split(nodes, size)) if len(nodes) else []

    def _take(self, scores: Tensor, nodes: Tensor, hidden: Tensor) -> None:
        """Fill in the edges that leave some nodes, given the hidden states after these, (B, n, D)."""
        device = hidden.device
        edges = torch.isin(self.leaving, nodes).nonzero()[:, 0]
        at = torch.searchsorted(nodes, self.leaving[edges]).to(device)  # each edge's place among the nodes
        tokens = self.taking[edges].to(device)
        rows = max(1, _LOGIT_ROWS // len(nodes))
        for part, of in zip(torch.split(hidden, rows), torch.split(scores, rows), strict=True):
            every = logits(self.model, part.flatten(0, 1)).view(*part.shape[:2], -1)  # (b, n, V)
            of[:, edges.to(device)] = every[:, at, tokens] - every.logsumexp(dim=-1)[:, at]

    def paths(self, values: Tensor) -> Tensor:
        """Sum of each label's edges: (B, E) -> (B, K)."""
        return torch.stack([values[:, list(path)].sum(dim=1) for path in self.trie.paths], dim=1)

    def among_siblings(self, scores: Tensor) -> Tensor:
        """Log-probability of each edge among those that leave the same node: (B, E) -> (B, E)."""
        out = torch.empty_like(scores)
        for node in {node for node, _ in self.trie.edges}:
            edges = (self.leaving == node).nonzero()[:, 0].to(scores.device)
            out[:, edges] = scores[:, edges].log_softmax(dim=1)
        return out
