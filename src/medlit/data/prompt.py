"""The prompt, Alpaca's or the base model's own: one note -> token ids, where only the transcription is ever cut.

A prompt is three runs of token ids, tokenised separately and joined as ids: the header with the instruction, the
transcription, and the footer, after which the answer begins. So a note cannot merge with the template, whatever its
text, and cutting a long note leaves header, footer and answer whole. Training and evaluation share this code and one
limit.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from jinja2 import TemplateError

from medlit.errors import UserError
from medlit.unsloth_first import TOKENIZERS_PARALLELISM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["alpaca", "chat"]
INSTRUCTION = "Classify the following medical transcription into the correct medical specialty."

_MARKS = ("Medlit-Instruction", "Medlit-Transcription", "Medlit-Specialty")  # stand for texts in a chat template
# Some templates write today's date; this one is what Llama 3's write where there is no clock.
_DATE = date(2024, 7, 26)


def whole_characters(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and neither UTF-8 nor tokenizers can encode, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# A tokenizer of a forked process would wait for threads that only its parent has, so there they are off; they must be
# off before the fork, or tokenizers prints a warning.
os.register_at_fork(
    before=lambda: os.environ.setdefault(TOKENIZERS_PARALLELISM, ""),
    after_in_parent=lambda: os.environ.get(TOKENIZERS_PARALLELISM) == "" and os.environ.pop(TOKENIZERS_PARALLELISM),
)


class Prompt(NamedTuple):
    """Token ids of one prompt, and how many of the transcription did not fit."""

    input_ids: list[int]
    cut_tokens: int


class Template(NamedTuple):
    """The texts around instruction, transcription and specialty, in their order."""

    begin: str
    between: str
    footer: str
    gap: str  # spaces before the specialty, which tokenizers join to its first word
    end: str  # the token that ends the answer

    def __str__(self) -> str:
        return "{}{{instruction}}{}{{transcription}}{}{}{{specialty}}{}".format(*self)


@dataclass(frozen=True)
class NotePrompt:
    """Builds prompts and responses for one tokenizer; a subclass has the template."""

    tokenizer: PreTrainedTokenizerBase
    instruction: str = INSTRUCTION
    max_length: int = 2048  # maximum number of tokens in prompt and response together
    max_response_tokens: int = 32  # tokens of these that are reserved for the response

    version: ClassVar[str]  # format and number; raise the number when the same settings give another prompt

    @cached_property
    def template(self) -> Template:
        """The texts of the prompt."""
        raise NotImplementedError

    @cached_property
    def _plain(self) -> PreTrainedTokenizerBase:
        """The tokenizer for notes: all tokens that a chat template writes, such as <think>, are special in it."""
        written, added = str(self.tokenizer.chat_template), self.tokenizer.added_tokens_decoder.values()
        spelled = [token.content for token in added if token.content.strip() and token.content in written]
        if {*spelled} <= {token.content for token in added if token.special}:
            return self.tokenizer
        plain = copy.deepcopy(self.tokenizer)
        plain.add_tokens(spelled, special_tokens=True)
        return plain

    def _rows(self, texts: list[str], template: bool = False) -> list[list[int]]:
        whole, tokenizer = [whole_characters(text) for text in texts], self.tokenizer if template else self._plain
        # The text of a note must never become a control token, even where it spells one.
        return list(tokenizer(whole, add_special_tokens=False, split_special_tokens=not template)["input_ids"])

    def _ids(self, text: str, template: bool = False) -> list[int]:
        return self._rows([text], template)[0]

    def _spells_control_tokens(self, text: str) -> bool:
        return self._ids(text) != self._ids(text, template=True)

    @cached_property
    def _line_break(self) -> list[int]:
        """Ids of a line break, for tokenizers that add a space before the first word of a text (as Llama 2's)."""
        line_break, joint = self._ids("\n"), self._ids("\nx")
        size = len(line_break)
        return line_break if joint[:size] == line_break and joint[size:] != self._ids("x") else []

    def _inside(self, texts: Sequence[str], template: bool = False) -> list[list[int]]:
        """Ids of texts in the middle of a prompt: tokenised after a line break where that avoids an added space."""
        lead = self._line_break
        size, rows = len(lead), self._rows(["\n" * bool(lead) + text for text in texts], template)
        pairs = zip(rows, texts, strict=True)
        return [ids[size:] if ids[:size] == lead else self._ids(text, template) for ids, text in pairs]

    @cached_property
    def header(self) -> list[int]:
        """Ids before the transcription, with one BOS where the tokenizer or the template adds one."""
        begin, text = self.template.begin, self.instruction + self.template.between
        if self._spells_control_tokens(text):
            ids = [*self._ids(begin, template=True), *self._inside([text])[0]]
        else:
            ids = self._ids(begin + text, template=True)
        bos = [self.tokenizer.bos_token_id]
        return [*bos, *ids] if self.tokenizer("x")["input_ids"][:1] == bos != ids[:1] else ids

    @cached_property
    def footer(self) -> list[int]:
        """Ids after the transcription."""
        return self._inside([self.template.footer], template=True)[0]

    @cached_property
    def end(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.template.end)  # type: ignore[return-value]

    @cached_property
    def room(self) -> int:
        """Maximum number of tokens of a transcription; a UserError if the limit leaves no room for one."""
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
        rows, room = self._inside(transcriptions), self.room
        return [Prompt([*self.header, *ids[:room], *self.footer], max(0, len(ids) - room)) for ids in rows]

    def response(self, specialty: str) -> list[int]:
        """Ids of the answer, tokenised after the footer, and of the token that ends it; a UserError if it is long."""
        text, footer, size = self.template.gap + specialty, self.template.footer, len(self.footer)
        joint = [] if self._spells_control_tokens(text) else self._inside([footer + text], template=True)[0]
        ids = [*(joint[size:] if joint[:size] == self.footer else self._inside([text])[0]), self.end]
        if len(ids) > self.max_response_tokens:
            raise UserError(
                f"data.max_response_tokens: the label {specialty!r} has {len(ids)} tokens and"
                f" {self.max_response_tokens} are kept for an answer; set it and model.decoding.max_new_tokens to at"
                f" least {len(ids)}."
            )
        return ids


class AlpacaPrompt(NotePrompt):
    """The prompt of the recipe, which any model can be trained with; the tokenizer's EOS ends an answer."""

    version = "alpaca-1"

    @cached_property
    def template(self) -> Template:
        """The texts of the prompt."""
        begin = (
            "Below is an instruction that describes a task, paired with an input that provides further context."
            " Write a response that appropriately completes the request.\n\n### Instruction:\n"
        )
        return Template(begin, "\n\n### Input:\n", "\n\n### Response:\n", "", str(self.tokenizer.eos_token))


class ChatPrompt(NotePrompt):
    """Instruction and note as a user's turn of the base model's own chat template, the specialty as the answer."""

    version = "chat-1"

    @cached_property
    def template(self) -> Template:
        """The texts of the prompt, if possible without thinking; a UserError without a template that holds them."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "data.prompt_format: 'chat' needs a chat template and the base model has none; set it"
                " to 'alpaca', or name an instruction-tuned base model."
            )
        user = {"role": "user", "content": "\n".join(_MARKS[:2])}
        answer = {"role": "assistant", "content": _MARKS[2]}
        try:
            begin, between, footer = _split(self._render([user], add_generation_prompt=True), _MARKS[:2])
            *_, written, ending = _split(self._render([user, answer]), _MARKS)
            # As in GLM 4, the next turn may be what ends an answer.
            following = self._render([user, answer, user]).partition(_MARKS[2])[2]
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                "data.prompt_format: the base model's chat template cannot hold an instruction, a note"
                " and an answer as they are; set it to 'alpaca'."
            ) from error
        # What a template writes between prompt and answer belongs to the prompt; so does the end of a thinking block
        # that the prompt leaves open.
        if written.startswith(footer) or footer.rstrip().endswith("<think>"):
            footer = written
        words = footer.rstrip(" ")
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        ends = [[token for token in added if text.lstrip().startswith(token)] for text in (ending, following)]
        end = max(ends[0] or ends[1] or [str(self.tokenizer.eos_token)], key=len)
        return Template(begin, between, words, footer[len(words) :], end)

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:  # noqa: ANN401 - of Jinja
        least = re.search(r"""["'](none|no_think)["']""", str(self.tokenizer.get_chat_template()))
        # The switches of Qwen 3, SmolLM3 and GLM; Granite and DeepSeek; Cohere; Seed; gpt-oss and Mistral.
        off = {**dict.fromkeys(("enable_thinking", "thinking", "reasoning"), False), "thinking_budget": 0}
        options |= off | {"reasoning_effort": least[1] if least else "low", "strftime_now": _DATE.strftime}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The texts around marks, each of which must occur in a text once and in this order."""
    parts = re.split(f"({'|'.join(marks)})", text)
    if parts[1::2] != [*marks]:
        raise ValueError("the template changes the messages")
    return parts[::2]


PROMPTS: dict[str, type[NotePrompt]] = {"alpaca": AlpacaPrompt, "chat": ChatPrompt}
