"""The trie of answers: every answer is a path, and what they share is there once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medlit.model.decoding.trie import ROOT, TokenTrie

EOS = 9
ANSWERS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(lambda ids: [*ids, EOS]), max_size=6)


@given(ANSWERS)
def test_every_answer_is_a_path_from_the_root_to_its_end(answers: list[list[int]]) -> None:
    trie = TokenTrie.of(answers)
    for answer, path in zip(answers, trie.paths, strict=True):
        assert [trie.edges[edge][1] for edge in path] == answer
        node = ROOT
        for token, edge in zip(answer, path, strict=True):
            assert trie.edges[edge][0] == node
            node = trie.children[node].get(token, node)
        assert [trie.tokens[place] for place in trie.ancestors(node)] == answer[:-1]


@given(ANSWERS)
def test_shared_beginnings_are_stored_once(answers: list[list[int]]) -> None:
    trie = TokenTrie.of(answers)
    beginnings = {tuple(answer[:i]) for answer in answers for i in range(1, len(answer))}
    assert len(trie) == len(beginnings)
    assert len(trie.edges) == len(beginnings | {tuple(answer) for answer in answers})
    assert all(parent < node for node, parent in enumerate(trie.parents))


def test_a_label_that_begins_another() -> None:
    trie = TokenTrie.of([[1, EOS], [1, 2, EOS]])
    assert trie.edges == ((ROOT, 1), (0, EOS), (0, 2), (1, EOS))
    assert trie.paths == ((0, 1), (0, 2, 3))
