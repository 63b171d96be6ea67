"""Chat templates of real families as their tokenizers have them, with small tokenizers of the same kind.

Shortened where a conversation of one user's turn and one answer does not come: tools, images, system messages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True)
class ChatFamily:
    """A template, its tokens, and what medlit's prompt must be."""

    jinja: str
    prompt: str  # with {instruction} and {transcription}
    answer: str  # with {specialty}, up to the token that ends it
    control: tuple[str, ...]  # special tokens, the BOS first if there is one
    eos: str  # the tokenizer's, which need not be what ends an answer
    bos: str | None = None
    adds_bos: bool = False  # whether the tokenizer adds the BOS to a text
    words: tuple[str, ...] = ()  # added tokens that are not special
    spacing: bool = False  # a space before the first word of a text, as SentencePiece puts it
    rstrip: bool = False  # control tokens swallow the space after them
    gpt2: bool = False  # two line breaks before a word are two tokens, as GPT-2 splits them

    @property
    def end(self) -> str:
        return self.answer.partition("{specialty}")[2]


LLAMA3 = ChatFamily(
    jinja="""\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    prompt="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "{instruction}\n{transcription}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{specialty}<|eot_id|>",
    control=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",  # as in the tokenizer of the first Llama 3
    adds_bos=True,
)
QWEN3 = ChatFamily(
    jinja="""\
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last_query_index == messages|length - 1 and message.role == "user" %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    prompt="<|im_start|>user\n{instruction}\n{transcription}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    answer="{specialty}<|im_end|>",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    words=("<think>", "</think>"),
    eos="<|im_end|>",
)
GEMMA = ChatFamily(
    jinja="""\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    prompt="<bos><start_of_turn>user\n{instruction}\n{transcription}<end_of_turn>\n<start_of_turn>model\n",
    answer="{specialty}<end_of_turn>",
    control=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    words=("\n\n", "<b>"),  # tokens of texts, which a note may hold
    bos="<bos>",
    eos="<eos>",
    adds_bos=True,
)
MISTRAL = ChatFamily(
    jinja="""\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    prompt="<s>[INST] {instruction}\n{transcription}[/INST]",
    answer=" {specialty}</s>",
    control=("<s>", "</s>", "[INST]", "[/INST]"),
    bos="<s>",
    eos="</s>",
    adds_bos=True,
    spacing=True,
)
PHI3 = ChatFamily(
    jinja="""\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    prompt="<|user|>\n{instruction}\n{transcription}<|end|>\n<|assistant|>\n",
    answer="{specialty}<|end|>",
    control=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    bos="<s>",
    eos="<|endoftext|>",
    spacing=True,
    rstrip=True,
)
SMOLLM = ChatFamily(
    jinja="""\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}\
{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    prompt="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{instruction}\n{transcription}<|im_end|>\n<|im_start|>assistant\n",
    answer="{specialty}<|im_end|>",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    gpt2=True,
)
ZEPHYR = ChatFamily(  # the tokenizer adds the BOS, the template does not; roles are plain text
    jinja="""\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    prompt="<|user|>\n{instruction}\n{transcription}</s>\n<|assistant|>\n",
    answer="{specialty}</s>",
    control=("<s>", "</s>"),
    bos="<s>",
    eos="</s>",
    adds_bos=True,
    spacing=True,
)
GPT_OSS = ChatFamily(
    jinja="""\
{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
{{- "Reasoning: " + reasoning_effort + "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- else %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}""",
    prompt="<|start|>system<|message|>Current date: 2024-07-26\n\nReasoning: low<|end|>"
    "<|start|>user<|message|>{instruction}\n{transcription}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>",
    answer="{specialty}<|return|>",
    control=("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    eos="<|return|>",
)
GLM4 = ChatFamily(  # nothing ends an answer but the token of the next turn
    jinja="""\
[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    prompt="[gMASK]<sop><|user|>\n{instruction}\n{transcription}<|assistant|>\n",
    answer="{specialty}<|user|>",
    control=("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    eos="<|endoftext|>",
)
REASONER = ChatFamily(  # a distilled R1: the prompt opens a thinking block and an answer has none
    jinja="""\
{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '<|User|>' + message.content }}{% else %}\
{{ '<|Assistant|>' + message.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}""",
    prompt="<|bos|><|User|>{instruction}\n{transcription}<|Assistant|>",
    answer="{specialty}<|eos|>",
    control=("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"),
    words=("<think>", "</think>"),
    bos="<|bos|>",
    eos="<|eos|>",
    adds_bos=True,
)
FAMILIES = {
    "Llama 3": LLAMA3,
    "Qwen 3": QWEN3,
    "Gemma": GEMMA,
    "Mistral": MISTRAL,
    "Phi-3": PHI3,
    "SmolLM": SMOLLM,
    "Zephyr": ZEPHYR,
    "gpt-oss": GPT_OSS,
    "GLM 4": GLM4,
    "R1": REASONER,
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Merges over the boundaries of words and parts, as real vocabularies have them.
_WORDS = [" Neurology", "Neurology", " Orthopedic", "Orthopedic", " Classify", "Classify", ".\n\n", "\n\n", " A note"]


@functools.cache
def tokenizer_of(family: ChatFamily) -> PreTrainedTokenizerBase:
    """A small tokenizer of the family's kind."""
    if family.spacing:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
        words = [word.replace(" ", "▁") for word in _WORDS if "\n" not in word]
    else:
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in _WORDS]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=family.spacing))
    if family.spacing:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        pattern = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.gpt2)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([bytes_of] if family.gpt2 else [pattern, bytes_of])
        tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(text, special=True, normalized=False, rstrip=family.rstrip) for text in family.control]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.words])
    if family.adds_bos and family.bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        chat_template=family.jinja,
    )
