"""Free greedy generation with the list of labels as its draft.

A trained model nearly always answers with a label, so all labels are computed after the prompt in one pass, and the
model's most likely token is looked up at one node after another: the answer is that of generating token by token, for
the price of one pass instead of one per token. A row that leaves the trie continues token by token.

B notes, T prompt tokens, N nodes of the trie.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medlit.data.collate import Prompts, pad
from medlit.data.labels import LabelSet
from medlit.model.decoding.kv_cache import Prefix, read_prompts
from medlit.model.decoding.likelihood import Answers, LabelScorer
from medlit.model.decoding.trie import ROOT, TokenTrie
from medlit.model.families import causal_lm
from medlit.model.head import head_logits


def eos_ids(model: nn.Module, tokenizer: Any) -> list[int]:  # noqa: ANN401 - transformers' tokenizers are untyped
    """Every token that ends an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*several, tokenizer.eos_token_id] if token is not None})


@dataclass
class Generate:
    """Greedy answers that may be anything; `LabelSet.parse` reads the label."""

    model: nn.Module
    tokenizer: Any
    label_set: LabelSet
    max_new_tokens: int
    scorer: LabelScorer
    stop_early: bool = True
    ends: Collection[int] = ()  # tokens that end an answer; those of `eos_ids` do too

    def __post_init__(self) -> None:
        self.ends = {*eos_ids(self.model, self.tokenizer), *self.ends}

    def __call__(self, prompts: Prompts) -> Answers:
        """Answer B notes."""
        cache = read_prompts(self.model, prompts)
        answers: list[list[int]] = [[] for _ in prompts.rows]
        pending, label_nats = self._look_up(cache, answers)
        rows = list(range(len(answers)))
        while pending:
            if len(pending) < len(rows):
                cache = cache.rows(torch.tensor([rows.index(row) for row in pending], device=cache.last.device))
                rows = list(pending)
            tokens, real = (x.to(cache.last.device) for x in pad(list(pending.values()), 0, "right"))
            cache = cache.extend(tokens, real.bool())
            chosen = self.next_tokens(cache.last, rows, answers)
            pending = {
                row: [token] for row, token in zip(rows, chosen, strict=True) if self._append(answers[row], token)
            }
        texts = [self._text(answer) for answer in answers]
        return Answers(torch.tensor([self.label_set.parse(text) for text in texts]), texts, label_nats=label_nats)

    def next_tokens(self, hidden: Tensor, rows: list[int], answers: list[list[int]]) -> list[int]:
        """The most likely token after each hidden state, (b, D), of these rows, whose answers so far are given."""
        with torch.no_grad():
            chosen: list[int] = head_logits(self.model, hidden).argmax(dim=1).tolist()
        return chosen

    def _look_up(self, cache: Prefix, answers: list[list[int]]) -> tuple[dict[int, list[int]], Tensor | None]:
        """Answer as far as the trie leads.

        Returns unfinished rows that left the trie -> their answers so far, which the cache does not hold yet; and each
        label's log-likelihood, (B, K), if the labels were scored.
        """
        # More nodes than the prompts have columns would cost more than they save.
        trie = self.scorer.trie if len(self.scorer.trie) <= cache.mask.shape[1] else TokenTrie.of([])
        hidden = cache.last[:, None]  # (B, 1 + N, D): the root's, then the nodes'
        nats = None
        if len(trie):
            hidden = torch.cat([hidden, self.scorer.hidden(cache, torch.arange(len(trie)))], dim=1)
            nats = self.scorer.paths(self.scorer.edges_at(hidden)).cpu()
        places = dict.fromkeys(range(len(answers)), ROOT)
        left: dict[int, list[int]] = {}
        while places:
            rows, nodes = list(places), list(places.values())
            at = torch.tensor([rows, nodes], device=hidden.device)
            chosen = self.next_tokens(hidden[at[0], 1 + at[1]], rows, answers)
            places = {}
            for row, node, token in zip(rows, nodes, chosen, strict=True):
                if self._append(answers[row], token):
                    child = trie.children[node].get(token)
                    if child is None:
                        left[row] = answers[row]
                    else:
                        places[row] = child
        return dict(sorted(left.items())), nats

    def _append(self, answer: list[int], token: int) -> bool:
        """Append a token to an answer; whether generation continues."""
        answer.append(token)
        if token in self.ends or len(answer) >= self.max_new_tokens:
            return False
        return not (self.stop_early and self.label_set.settled(self._text(answer)))

    def _text(self, answer: list[int]) -> str:
        tokens = answer[:-1] if answer[-1] in self.ends else answer
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
