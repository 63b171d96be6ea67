"""How a config's notes and labels look to the model: label tokens, one example, what carries loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from medlit.data.builtin import builtin_notes
from medlit.data.collate import Batch
from medlit.data.collate import Row as Tokenised
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.prompt import AlpacaPrompt
from medlit.tools.doctor.check_result import Row
from medlit.tools.doctor.show import Example

_NAMED = 3


def label_row(prompt: AlpacaPrompt, names: Sequence[str]) -> Row:
    """Whether the labels can be told apart, and told from one another's beginnings, as token ids.

    Args:
        prompt: gives a label's answer as token ids with its EOS.
        names: K labels.

    Raises:
        UserError: an answer is longer than what is kept for it.
    """
    answers = sorted((prompt.response(name)[:-1], name) for name in names)
    # In the order of ids a label that begins others stands right before the first of them.
    alike = [(a, b) for (ids, a), (others, b) in pairwise(answers) if ids == others]
    begun = [(a, b) for (ids, a), (others, b) in pairwise(answers) if ids != others and others[: len(ids)] == ids]
    if alike:
        found = f"the same tokens stand for {_pairs(alike)}, so that no answer can tell them apart"
        return Row("labels", "fail", found, "spell them otherwise with data.labels.aliases")
    sizes = [len(ids) + 1 for ids, _ in answers]
    found = f"{len(names)} of {min(sizes)} to {max(sizes)} tokens with the end"
    if begun:
        found += f"; one label's tokens begin another's: {_pairs(begun)}"
        cure = "nothing, unless answers stop too early: then spell them otherwise with data.labels.aliases"
        return Row("labels", "warn", found, cure)
    first = len({ids[0] for ids, _ in answers})
    return Row("labels", "ok", f"{found}, {first} different first tokens; none is the beginning of another")


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    return ", ".join(f"{a!r} and {b!r}" for a, b in pairs[:_NAMED]) + more


def invented(data: TranscriptionDataModule) -> Batch:
    """A batch of one invented note, made as the config makes its own."""
    (note,) = builtin_notes(train=1, validation=0, test=0)["train"]
    asked = data.prompt.prompt(note["transcription"])
    row = Tokenised(
        row=0,
        id=note["id"],
        text_hash="",
        input_ids=asked.input_ids,
        cut_tokens=asked.cut_tokens,
        specialty=note["medical_specialty"],
    )
    return data.collator.train([row], data.collator.supervised(row))


def example(batch: Batch, prompt: AlpacaPrompt) -> Example:
    """The first note of a batch, decoded, in runs of tokens that carry loss or do not."""
    padded = batch.padded()
    ids = padded.input_ids[0, : padded.lengths[0]].tolist()
    width = padded.input_ids.shape[1]
    taught = {place + 1 for place in padded.places.tolist() if place < width}
    ends = [0, *(at for at in range(1, len(ids)) if (at in taught) != (at - 1 in taught)), len(ids)]
    runs = [(str(prompt.tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False)), a) for a, b in pairwise(ends)]
    return [(text, begin in taught) for text, begin in runs]


def supervision_row(batches: Iterable[Batch], whole: bool) -> Row:
    """Whether every micro-batch has something to learn from.

    Args:
        batches: micro-batches of an epoch.
        whole: whether these are all of them.
    """
    counts = [(len(batch.places), sum(batch.lengths)) for batch in batches]
    taught = [supervised for supervised, _ in counts]
    empty = sum(supervised == 0 for supervised in taught)
    which = f"{len(counts)} micro-batches of an epoch" if whole else f"the first {len(counts)} micro-batches"
    if empty:
        cure = "look at data.mask_prompt, data.max_response_tokens and the labels: nothing is learned from such a batch"
        return Row("supervised tokens", "fail", f"none in {empty} of {which}", cure)
    share = sum(taught) / sum(tokens for _, tokens in counts)
    found = f"{min(taught)} to {max(taught)} in each of {which}, {share:.1%} of all tokens"
    return Row("supervised tokens", "ok", found)
