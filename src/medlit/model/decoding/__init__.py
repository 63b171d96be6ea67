"""Decoders: three ways to answer a batch of prompts, one interface.

A decoder takes left-padded prompts and returns `Answers`. All three compute the prompts once, without a mask, and then
the whole list of labels in one more pass.
"""

from collections.abc import Callable

from torch import nn

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.data.prompt import NotePrompt
from medlit.errors import WARNED, UserError, tell
from medlit.model.decoding.generate import Generate
from medlit.model.decoding.likelihood import (
    Answers,
    Constrained,
    LabelScorer,
    Likelihood,
    apply_prior,
    apply_temperature,
)
from medlit.model.decoding.trie import TokenTrie
from medlit.model.families import most_tokens
from medlit.model.prior import TokenPrior
from medlit.model.settings import Decoding

__all__ = ["Answers", "Decoder", "LabelScorer", "apply_temperature", "make_decoder"]

Decoder = Callable[[Prompts], Answers]


def make_decoder(
    settings: Decoding, model: nn.Module, prompt: NotePrompt, label_set: LabelSet, prior: TokenPrior | None = None
) -> Decoder:
    """Build the decoder that the settings name; a prior is for those that give probabilities.

    Raises a UserError if a list of labels is needed and there is none, or a label has too many tokens.
    """
    if settings.mode != "generate" and not label_set.names:
        raise UserError(
            f"model.decoding.mode: {settings.mode!r} needs the list of labels, and neither the notes nor the weights"
            " have one; give a checkpoint or an adapter, or set it to 'generate'."
        )
    responses = [prompt.response(name) for name in label_set]
    scorer = LabelScorer(model, TokenTrie.of(responses))
    if settings.mode == "generate":
        ends, most = [prompt.end], settings.max_new_tokens
        tokens, longest = max(zip(map(len, responses), label_set, strict=True), default=(0, ""))  # with the EOS
        if tokens - 1 > most and longest not in WARNED:
            tell(f"model.decoding.max_new_tokens: {most} cuts the label {longest!r}, which has {tokens - 1} tokens")
            WARNED.add(longest)
        if positions := most_tokens(model):  # as if each prompt were full
            most = min(most, positions - prompt.max_length + prompt.max_response_tokens)
        return Generate(model, prompt.tokenizer, label_set, most, scorer, settings.stop_early, ends)
    decoder = Constrained(scorer, label_set) if settings.mode == "constrained" else Likelihood(scorer, label_set)
    if prior is None:
        return decoder
    return lambda prompts: apply_prior(decoder(prompts), prior.power * prior.of_prompts(prompts), label_set.names)
