"""Both protocols, with byte tokenizers: without merges, every byte is a token."""

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxgrad.data import chat_template, tokens
from jaxgrad.data.chat_template import SYSTEM_MESSAGE, uses_chat
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import Protocol, tokenize, tokenize_all
from jaxgrad.errors import UserError

BOS, EOS = "<s>", "</s>"
TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LLAMA3 = "{{ bos_token }}" + TURNS
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + LLAMA3
)
ALTERNATING = (
    "{% if messages | length > 2 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + TURNS
)
# What `clean` keeps of the template behind a response.
CLOSING = {"paper": "", "clean": ";"}
BOTH = pytest.mark.parametrize("name", ["paper", "clean"])


def byte_tokenizer(*, merges=(), front="", back="", template=None, trim_offsets=False, **kwargs):
    """A byte-level BPE; `front` and `back` are what the post-processor adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(
                single=f"{front} $A {back}".strip(),
                special_tokens=[(t, backend.token_to_id(t)) for t in (BOS, EOS)],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, **kwargs
    )
    tokenizer.chat_template = template
    return tokenizer


def example(instruction, response, *before):
    messages = (*before, Message("user", instruction))
    return Example(index=7, id="0" * 16, messages=messages, response=response)


def spell(tokenizer, item):
    """The tokens' texts, and those of the targets."""
    texts = [tokenizer.decode([i]) for i in item.token_ids]
    return texts, [texts[target] for target in item.targets]


def check_counts(item):
    assert item.token_ids.dtype == np.int32 and item.token_ids.ndim == 1
    assert item.num_prompt_tokens + item.num_response_tokens == item.num_tokens
    assert item.num_tokens == 0 or item.num_prompt_tokens >= 1
    assert item.measurable == (item.reason is None)
    assert item.measurable == (item.num_response_tokens >= 1)
    assert item.targets.tolist() == list(range(item.num_prompt_tokens, item.num_tokens))


# The text


@BOTH
@pytest.mark.parametrize("front", ["", BOS])
def test_base_text(name, front):
    tokenizer = byte_tokenizer(front=front)
    item = tokenize(example("Größe?", "ja: ja"), tokenizer, Protocol(name))
    prompt = "Größe?\n".encode()
    num_bos = 1 if front else 0
    expected = [tokenizer.bos_token_id] * num_bos
    expected += tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Größe?\nja: ja"))
    assert item.token_ids.tolist() == expected
    assert item.num_prompt_tokens == num_bos + len(prompt)
    assert item.num_response_tokens == len("ja: ja")
    assert spell(tokenizer, item)[1] == list("ja: ja")
    assert not item.truncated and item.measurable
    check_counts(item)


@BOTH
def test_base_joins_all_turns(name):
    tokenizer = byte_tokenizer()
    item = tokenize(example("b", "r", Message("system", "a")), tokenizer, Protocol(name))
    assert tokenizer.decode(item.token_ids) == "a\nb\nr"


@BOTH
def test_chat_adds_the_authors_system_message(name):
    tokenizer = byte_tokenizer(template=TURNS)
    item = tokenize(example("Hi", "Yo"), tokenizer, Protocol(name, chat=True))
    prompt = f"[system]{SYSTEM_MESSAGE};[user]Hi;[assistant]"
    assert SYSTEM_MESSAGE == "You are a helpful assistant."
    assert tokenizer.decode(item.token_ids) == prompt + "Yo" + CLOSING[name]
    assert item.num_prompt_tokens == len(prompt)
    assert spell(tokenizer, item)[1] == ["Y", "o", *CLOSING[name]]


@BOTH
def test_chat_keeps_the_records_own_system_message(name):
    tokenizer = byte_tokenizer(template=TURNS)
    turns = Message("system", "S"), Message("user", "u"), Message("assistant", "a")
    item = tokenize(example("v", "r", *turns), tokenizer, Protocol(name, chat=True))
    prompt = "[system]S;[user]u;[assistant]a;[user]v;[assistant]"
    assert tokenizer.decode(item.token_ids) == prompt + "r" + CLOSING[name]


@BOTH
def test_a_template_that_refuses_the_system_role_gets_the_user_turn_alone(name):
    tokenizer = byte_tokenizer(template=GEMMA)
    item = tokenize(example("Hi", "Yo"), tokenizer, Protocol(name, chat=True))
    assert tokenizer.decode(item.token_ids) == BOS + "[user]Hi;[assistant]Yo" + CLOSING[name]


def test_a_refused_system_message_of_the_record_is_not_dropped():
    tokenizer = byte_tokenizer(template=GEMMA)
    item = example("Hi", "Yo", Message("system", "S"))
    with pytest.raises(UserError, match=r"record 7: .* system, user: System role not supported"):
        tokenize(item, tokenizer, Protocol(chat=True))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ALTERNATING, "Roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{% if %}", ""),
    ],
)
def test_a_template_that_fails_names_the_record(template, reason):
    turns = Message("user", "a"), Message("assistant", "b")
    with pytest.raises(
        UserError, match=rf"record 7: the chat template fails .*{reason}.*--chat=no"
    ):
        tokenize(example("c", "d", *turns), byte_tokenizer(template=template), Protocol(chat=True))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ namespace(__class__=1) }}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(escape):
    """Either the template fails or it gives text; never a Python object."""
    tokenizer = byte_tokenizer(template=f"[{escape}]")
    with pytest.raises(UserError, match=r"record 7: the chat template fails"):
        tokenize(example("a", "b"), tokenizer, Protocol(chat=True))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ 'a' * 100000000000 }}", "MemoryError"),
        ("{{ [messages] * 10000000000 }}", "MemoryError"),
        ("{{ 'a' * 10000000 }}", "makes 10000000 characters"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 9 **9** 9 }}", "powers"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogate"),
    ],
)
def test_a_template_without_end_or_measure_is_refused(monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", 1.0)
    tokenizer = byte_tokenizer(template=template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UserError, match=r"record 7: the chat template of some/model") as caught:
        tokenize(example("a", "b"), tokenizer, Protocol(chat=True))
    assert reason in str(caught.value) and len(str(caught.value)) < 600


# Special tokens


@pytest.mark.parametrize("template", [LLAMA3, GEMMA])
@pytest.mark.parametrize("front", ["", BOS])
def test_bos_printed_by_the_template(template, front):
    tokenizer = byte_tokenizer(template=template, front=front)
    paper, clean = (
        tokenize(example("Hi", "Yo"), tokenizer, Protocol(name, chat=True))
        for name in ("paper", "clean")
    )
    bos = tokenizer.bos_token_id
    assert np.count_nonzero(paper.token_ids == bos) == (2 if front else 1)
    assert np.count_nonzero(clean.token_ids == bos) == 1
    assert clean.token_ids[0] == bos
    assert paper.token_ids[1 if front else 0 :].tolist() == clean.token_ids[:-1].tolist()
    assert paper.num_response_tokens == clean.num_response_tokens - 1 == 2


@BOTH
def test_bos_added_by_the_tokenizer_stays_where_the_template_prints_none(name):
    tokenizer = byte_tokenizer(template=TURNS, front=BOS)
    item = tokenize(example("Hi", "Yo"), tokenizer, Protocol(name, chat=True))
    assert np.flatnonzero(item.token_ids == tokenizer.bos_token_id).tolist() == [0]


def test_eos_that_the_tokenizer_appends():
    tokenizer = byte_tokenizer(front=BOS, back=EOS)
    paper, clean = (
        tokenize(example("Hi", "Yo!"), tokenizer, Protocol(name)) for name in ("paper", "clean")
    )
    # The prefix, encoded by itself, has an EOS too: it masks the response's first token.
    assert spell(tokenizer, paper) == ([BOS, *"Hi\nYo!", EOS], ["o", "!", EOS])
    assert spell(tokenizer, clean) == ([BOS, *"Hi\nYo!"], ["Y", "o", "!"])
    cut = tokenize(example("Hi", "Yo!"), tokenizer, Protocol("paper", max_length=6))
    assert cut.truncated
    assert spell(tokenizer, cut) == ([BOS, *"Hi\nY", EOS], [EOS])


# The boundary


def test_straddling_token():
    tokenizer = byte_tokenizer(merges=[("Ċ", "a")])
    paper, clean = (
        tokenize(example("x", "abc"), tokenizer, Protocol(name)) for name in ("paper", "clean")
    )
    assert spell(tokenizer, paper) == (["x", "\na", "b", "c"], ["b", "c"])
    assert spell(tokenizer, clean) == (["x", "\na", "b", "c"], ["\na", "b", "c"])


def test_response_that_merges_into_the_prompt():
    tokenizer = byte_tokenizer(merges=[("Ċ", "a")])
    paper, clean = (
        tokenize(example("x", "a"), tokenizer, Protocol(name)) for name in ("paper", "clean")
    )
    assert paper.reason == tokens.NO_RESPONSE_TOKEN
    assert (paper.num_tokens, paper.num_prompt_tokens, paper.num_response_tokens) == (2, 2, 0)
    assert clean.measurable and clean.num_response_tokens == 1


def test_clean_counts_a_character_of_several_tokens_once_each():
    tokenizer = byte_tokenizer(front=BOS)
    item = tokenize(example("ü", "😀"), tokenizer, Protocol("clean"))
    assert item.num_prompt_tokens == 1 + len("ü\n".encode())
    assert item.num_response_tokens == len("😀".encode())


def test_clean_with_trimmed_offsets_keeps_the_responses_leading_spaces():
    tokenizer = byte_tokenizer(trim_offsets=True)
    item = tokenize(example("x ", "  a"), tokenizer, Protocol("clean"))
    assert spell(tokenizer, item)[1] == [" ", " ", "a"]


@BOTH
def test_response_that_occurs_in_the_prompt(name):
    tokenizer = byte_tokenizer()
    item = tokenize(example("5 5 5", "5"), tokenizer, Protocol(name))
    assert (item.num_prompt_tokens, item.num_response_tokens) == (6, 1)


@BOTH
def test_token_0_is_never_a_target(name):
    # One word, one token, and a pre-tokenizer that drops white space: the prompt has no token.
    backend = Tokenizer(models.WordLevel({"yes": 0, "sir": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    several = tokenize(example("", "yes sir yes"), tokenizer, Protocol(name))
    assert several.token_ids.tolist() == [0, 1, 0]
    assert (several.num_prompt_tokens, several.num_response_tokens) == (1, 2)
    one = tokenize(example("", "yes"), tokenizer, Protocol(name))
    assert (one.num_prompt_tokens, one.num_response_tokens) == (1, 0)
    blank = tokenize(example("yes", "  "), tokenizer, Protocol(name))
    assert one.reason == blank.reason == tokens.NO_RESPONSE_TOKEN
    nothing = tokenize(example("", ""), tokenizer, Protocol(name))
    assert nothing.num_tokens == nothing.num_prompt_tokens == 0
    assert nothing.reason == tokens.EMPTY_RESPONSE
    for item in (several, one, blank, nothing):
        check_counts(item)


# Truncation and reasons


@BOTH
@pytest.mark.parametrize("front", ["", BOS])
def test_every_max_length(name, front):
    tokenizer = byte_tokenizer(front=front)
    instruction, response = "seven..", "eleven....."
    prompt = bool(front) + len(instruction) + 1
    full = prompt + len(response)
    for max_length in range(2, full + 3):
        item = tokenize(
            example(instruction, response), tokenizer, Protocol(name, False, max_length)
        )
        assert item.num_tokens == min(full, max_length)
        assert item.truncated == (full > max_length)
        assert item.num_prompt_tokens == min(prompt, max_length)
        assert item.reason == (tokens.PROMPT_FILLS if prompt >= max_length else None)
        whole = tokenize(example(instruction, response), tokenizer, Protocol(name))
        assert item.token_ids.tolist() == whole.token_ids[:max_length].tolist()
        check_counts(item)


@BOTH
@pytest.mark.parametrize("max_length", [3, 1024])
def test_empty_response_comes_before_other_reasons(name, max_length):
    item = tokenize(example("hello", ""), byte_tokenizer(), Protocol(name, False, max_length))
    assert item.reason == tokens.EMPTY_RESPONSE
    assert item.num_tokens == item.num_prompt_tokens == min(len("hello\n"), max_length)
    check_counts(item)


@BOTH
def test_no_warning_about_the_models_own_limit(name, caplog):
    tokenizer = byte_tokenizer(model_max_length=5)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not propagate to the root
    try:
        item = tokenize(example("long enough", "too long"), tokenizer, Protocol(name, False, 15))
        assert item.truncated and not caplog.records
        tokenizer.encode("the handler does see the warning")
        # Twice the same where another test has let this logger propagate to the root.
        assert len({record.getMessage() for record in caplog.records}) == 1
    finally:
        logger.removeHandler(caplog.handler)


def test_tokenize_all_keeps_order_and_unmeasurable_ones():
    items = [example("a", "b"), example("c", ""), example("d", "e")]
    out = tokenize_all(items, byte_tokenizer(), Protocol())
    assert [item.example for item in out] == items
    assert [item.measurable for item in out] == [True, False, True]


# Refusals


def test_bad_protocols():
    with pytest.raises(UserError, match="--protocol=papier is unknown"):
        Protocol("papier")
    with pytest.raises(UserError, match="--max_length=1 leaves no token"):
        Protocol(max_length=1)
    with pytest.raises(UserError, match="no chat template; use --chat=no"):
        tokenize(example("a", "b"), byte_tokenizer(), Protocol(chat=True))


def test_tokenizers_that_cannot_serve():
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = "left"
    with pytest.raises(UserError, match="truncates on the left"):
        tokenize(example("a", "b"), tokenizer, Protocol("paper"))
    cut = tokenize(example("abcdef", "gh"), tokenizer, Protocol("clean", max_length=3))
    assert spell(tokenizer, cut)[0] == ["a", "b", "c"]

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="--protocol=clean takes offsets"):
        tokenize(example("a", "b"), Slow(), Protocol("clean"))


def test_uses_chat():
    base, chat = byte_tokenizer(), byte_tokenizer(template=TURNS)
    assert [uses_chat(base, "auto"), uses_chat(base, "no")] == [False, False]
    assert [uses_chat(chat, c) for c in ("auto", "yes", "no")] == [True, True, False]
    with pytest.raises(UserError, match="--chat=yes, but the tokenizer has no chat template"):
        uses_chat(base, "yes")
    with pytest.raises(UserError, match="--chat=maybe is unknown"):
        uses_chat(base, "maybe")
