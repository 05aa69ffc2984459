"""Chat templates of the kinds that models have, short ones of our own that behave like the published ones.

`⟦` and `⟧` stand around what the assistant writes: nothing in `plain`, `{% generation %}` in `marked`.
"""
# ruff: noqa: E501 - templates read worse wrapped

import functools
import re

import tiny_models
from tokenizers import AddedToken

_SYSTEM_FIRST = "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
_ALTERNATE = "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
_CALLS = "{% for call in m.tool_calls or [] %}{{ '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}{% endfor %}"
_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{% endif %}"
)

_KINDS = {
    # Qwen 2.5, SmolLM2: a line break behind the end of a turn; tools and calls.
    "ChatML with tools": _TOOLS
    + "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}⟦{{ m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}⟧{% else %}{{ m.content ~ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # Llama 2: no generation prompt; the system message inside the first turn; spaces around the answer.
    "Llama 2": _SYSTEM_FIRST
    + _ALTERNATE
    + "{% for m in rest %}{% if m.role == 'user' %}{{ '<s>[INST] ' }}{% if loop.first and system %}"
    "{{ '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m.content.strip() ~ ' [/INST]' }}"
    "{% else %}⟦{{ ' ' ~ m.content.strip() ~ ' </s>' }}⟧{% endif %}{% endfor %}",
    # Llama 3.1 and 3.2: trims; the date; a call instead of the content; tools; a role of their own for results.
    "Llama 3 with tools and a date": "{{ '<|begin|>Today is ' ~ strftime_now('%d %b %Y') ~ '\\n' }}"
    "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{% for m in messages %}"
    "{{ '<|header|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|/header|>\\n\\n' }}"
    "{% if m.role == 'assistant' %}⟦{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}"
    "{{ m.content | trim }}{% endif %}{{ '<|eot|>' }}⟧{% else %}{{ m.content | trim ~ '<|eot|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}",
    # Mistral 7B v0.3: the tools and the system message stand in the last user's turn, the latter only if that is
    # the last turn of all.
    "Mistral v3 with tools": _SYSTEM_FIRST
    + "{{ '<s>' }}{% set last = namespace(user=0) %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == last.user %}{{ '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST] ' }}{% if loop.last and system %}{{ system ~ '\\n\\n' }}{% endif %}"
    "{{ m.content ~ '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}{% elif m.tool_calls %}"
    "⟦{{ '[TOOL_CALLS] ' ~ (m.tool_calls | tojson) ~ '</s>' }}⟧{% else %}⟦{{ ' ' ~ m.content ~ '</s>' }}⟧"
    "{% endif %}{% endfor %}",
    # Gemma: no system role; the assistant is called model; trims.
    "Gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}"
    "⟦{{ m.content | trim ~ '<end_of_turn>\\n' }}⟧{% else %}"
    "{{ '<start_of_turn>' ~ m.role ~ '\\n' ~ m.content | trim ~ '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    # Phi-3: an end of text behind a conversation without a generation prompt.
    "Phi-3": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.role == 'assistant' %}"
    "⟦{{ m.content ~ '<|end|>\\n' }}⟧{% else %}{{ m.content ~ '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}⟦{{ '<|endoftext|>' }}⟧{% endif %}",
    # Phi-4's first release: the header of the answer stands behind each question, asked for or not.
    "Phi-4": "{% for m in messages %}{% if m.role == 'assistant' %}⟦{{ m.content ~ '<|im_end|>' }}⟧{% else %}"
    "{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{% if m.role != 'system' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}{% endif %}{% endfor %}",
    # Zephyr: headers of plain text.
    "Zephyr": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.role == 'assistant' %}"
    "⟦{{ m.content ~ '</s>\\n' }}⟧{% else %}{{ m.content ~ '</s>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # DeepSeek: nothing between the turns.
    "DeepSeek": _SYSTEM_FIRST
    + "{{ '<bos>' ~ system }}{% for m in rest %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' }}⟦{{ m.content ~ '<|eos|>' }}⟧{% else %}{{ '<|User|>' ~ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}",
    # Qwen3: empty thoughts where there are none; the thoughts before the last question are dropped.
    "Qwen3": _TOOLS
    + "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}⟦{% if loop.index0 > last.user %}"
    "{{ '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}⟧{% else %}{{ m.content ~ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # OLMo 2: a line break behind an answer that is not the last.
    "OLMo 2": "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}"
    "⟦{{ m.content ~ '<|endoftext|>' }}⟧{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}"
    "{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # Granite: tools and documents as turns of their own.
    "Granite": "{% if documents %}{{ '<|role|>documents<|/role|>' ~ (documents | tojson) ~ '<|endoftext|>\\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|role|>' ~ m.role ~ '<|/role|>' }}{% if m.role == 'assistant' %}"
    "⟦{{ m.content ~ '<|endoftext|>\\n' }}⟧{% else %}{{ m.content ~ '<|endoftext|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|role|>assistant<|/role|>' }}{% endif %}",
    # DeepSeek-R1, QwQ: the generation prompt opens the thoughts; thoughts in the text are dropped.
    "opens <think>": "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}"
    "⟦{{ m.content.split('</think>')[-1] ~ '<|im_end|>\\n' }}⟧{% else %}{{ m.content ~ '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
}

KINDS = tuple(_KINDS)
WITH_TOOLS = tuple(kind for kind in KINDS if "tool_calls" in _KINDS[kind])
_SPECIAL = re.compile(
    r"<\|[^' ]+?\|>|</?s>|<bos>|<(?:start|end)_of_turn>|</?(?:think|tool_call)>|\[/?[A-Z_]+\]"
)


def plain(kind: str) -> str:
    """A template of a kind."""
    return _KINDS[kind].replace("⟦", "").replace("⟧", "")


def marked(kind: str) -> str:
    """The same with marks around what the assistant writes."""
    return _KINDS[kind].replace("⟦", "{% generation %}").replace("⟧", "{% endgeneration %}")


@functools.cache
def tokenizer_with(template: str):
    """A tokenizer with this template, for which its control texts are special tokens."""
    tokenizer = tiny_models.build_tokenizer("llama-bpe")
    names = {"<|system|>", "<|user|>", "<|assistant|>", *_SPECIAL.findall(template)}
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in sorted(names)])
    tokenizer.chat_template = template
    return tokenizer
