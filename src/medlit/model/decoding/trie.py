"""The labels as token ids: a trie of the K answers, each with its EOS.

    Neurology EOS, Neurosurgery EOS     tokens   Neuro, logy, surgery      parents  root, 0, 0
                                        edges    (root, Neuro), (0, logy), (0, surgery), (1, EOS), (2, EOS)
                                        paths    [0, 1, 3], [0, 2, 4]

A node stands for the tokens that lead to it; the root is the end of the prompt. An EOS ends an answer, so it is an edge
that leads to no node. N nodes, E edges, K labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

ROOT = -1


@dataclass(frozen=True)
class TokenTrie:
    """Prefix tree over the token ids of K answers."""

    tokens: tuple[int, ...]  # the token that leads to each node, N of them, a node after its parent
    parents: tuple[int, ...]  # each node's parent, `ROOT` for a first token, N of them
    edges: tuple[tuple[int, int], ...]  # (node, token) of every continuation, E of them
    paths: tuple[tuple[int, ...], ...]  # edges of each label from the root to its EOS, K of them
    children: dict[int, dict[int, int]]  # node -> token -> node

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> Self:
        """Build the trie of K answers, each with its EOS as the last token."""
        tokens: list[int] = []
        parents: list[int] = []
        edges: dict[tuple[int, int], int] = {}
        children: dict[int, dict[int, int]] = {ROOT: {}}
        paths = []
        for answer in answers:
            node, path = ROOT, []
            for token in answer:
                path.append(edges.setdefault((node, token), len(edges)))
                if len(path) == len(answer):
                    break
                if token not in children[node]:
                    children[node][token] = len(tokens)
                    children[len(tokens)] = {}
                    tokens.append(token)
                    parents.append(node)
                node = children[node][token]
            paths.append(tuple(path))
        return cls(tuple(tokens), tuple(parents), tuple(edges), tuple(paths), children)

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self, node: int) -> list[int]:
        """The nodes from the root to a node, itself included."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]
