"""The Alpaca prompt: one note -> token ids, where only the transcription is ever cut.

A prompt is three runs of token ids, tokenised separately and joined as ids: the header up to `### Input:`, the
transcription, and the footer `### Response:`. So a note cannot merge with the template, whatever its text, and cutting
a long note leaves header, footer and answer whole. Training and evaluation share this code and one limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from medlit.errors import UserError
from medlit.unsloth_first import TOKENIZERS_PARALLELISM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_VERSION = "alpaca-1"
INSTRUCTION = "Classify the following medical transcription into the correct medical specialty."

_TEMPORARY = "temporarily"  # tokenizers reads any other value than its words for off as on

_HEADER = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n"
)
_FOOTER = "\n\n### Response:\n"


def whole_characters(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and neither UTF-8 nor tokenizers can encode, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let tokenizers use every core in this context, unless the user has set TOKENIZERS_PARALLELISM."""
    if os.environ.get(TOKENIZERS_PARALLELISM) != "":
        yield
        return
    os.environ[TOKENIZERS_PARALLELISM] = _TEMPORARY
    try:
        yield
    finally:
        if os.environ.get(TOKENIZERS_PARALLELISM) == _TEMPORARY:  # a fork changes it
            os.environ[TOKENIZERS_PARALLELISM] = ""


def _stay_on_one_core() -> None:
    """Switch threads off in a forked process, where a tokenizer would wait for threads that only the parent has."""
    if os.environ.get(TOKENIZERS_PARALLELISM) in ("", _TEMPORARY):
        os.environ[TOKENIZERS_PARALLELISM] = "false"


os.register_at_fork(after_in_child=_stay_on_one_core)


class Prompt(NamedTuple):
    """Token ids of one prompt, and how many of the transcription did not fit."""

    input_ids: list[int]
    cut_tokens: int


@dataclass(frozen=True)
class AlpacaPrompt:
    """Builds prompts and responses for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    instruction: str = INSTRUCTION
    max_length: int = 2048  # most tokens of prompt and response together
    max_response_tokens: int = 32  # tokens of these that are reserved for the response

    def _rows(self, texts: list[str]) -> list[list[int]]:
        whole = [whole_characters(text) for text in texts]
        # The text of a note must never become a control token, even where it spells one.
        rows: list[list[int]] = self.tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return rows

    def _ids(self, text: str) -> list[int]:
        return self._rows([text])[0]

    @cached_property
    def _line_break(self) -> list[int]:
        """Ids of a line break, for tokenizers that add a space before the first word of a text (as Llama 2's)."""
        line_break, joint = self._ids("\n"), self._ids("\nx")
        size = len(line_break)
        return line_break if joint[:size] == line_break and joint[size:] != self._ids("x") else []

    def _inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in the middle of a prompt: tokenised after a line break where that avoids an added space."""
        lead = self._line_break
        size, rows = len(lead), self._rows(["\n" * bool(lead) + text for text in texts])
        return [ids[size:] if ids[:size] == lead else self._ids(text) for ids, text in zip(rows, texts, strict=True)]

    @cached_property
    def header(self) -> list[int]:
        """Ids before the transcription, with one BOS where the tokenizer adds one."""
        ids = self._ids(_HEADER.format(instruction=self.instruction))
        starts_with_bos = self.tokenizer("x")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return [self.tokenizer.bos_token_id, *ids] if starts_with_bos else ids

    @cached_property
    def footer(self) -> list[int]:
        """Ids after the transcription."""
        return self._inside([_FOOTER])[0]

    @cached_property
    def room(self) -> int:
        """Most tokens of a transcription that fit.

        Raises:
            UserError: the limit leaves no room for a transcription.
        """
        room = self.max_length - self.max_response_tokens - len(self.header) - len(self.footer)
        if room < 1:
            raise UserError(
                f"model.language_model.max_length: {self.max_length} tokens leave no room for a note beside the"
                f" prompt's {len(self.header) + len(self.footer)} and the answer's {self.max_response_tokens}; set it"
                f" to at least {self.max_length - room + 64}."
            )
        return room

    def prompt(self, transcription: str) -> Prompt:
        """The prompt of one note."""
        return self.prompts([transcription])[0]

    def prompts(self, transcriptions: Sequence[str]) -> list[Prompt]:
        """The prompts of notes, in their order; what does not fit is cut from the end of the transcription."""
        if not transcriptions:
            return []
        with _on_all_cores() if len(transcriptions) > 1 else nullcontext():
            inside = self._inside(transcriptions)
        room = self.room
        return [Prompt([*self.header, *ids[:room], *self.footer], max(0, len(ids) - room)) for ids in inside]

    def response(self, specialty: str) -> list[int]:
        """Ids of the answer, tokenised after the footer, where generation starts, and the tokenizer's EOS.

        Raises:
            UserError: the answer is longer than `max_response_tokens`.
        """
        joint, alone = self._inside([_FOOTER + specialty, specialty])
        size = len(self.footer)
        answer = joint[size:] if joint[:size] == self.footer else alone
        ids = [*answer, self.tokenizer.eos_token_id]
        if len(ids) > self.max_response_tokens:
            raise UserError(
                f"data.max_response_tokens: the label {specialty!r} has {len(ids)} tokens and"
                f" {self.max_response_tokens} are kept for an answer; set data.max_response_tokens to at least"
                f" {len(ids)}."
            )
        return ids
