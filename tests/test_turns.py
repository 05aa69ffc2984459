"""The assistant's turns in templates of every kind, token for token as transformers and TRL mask them."""

import jinja2
import pytest
from chat_templates import KINDS, WITH_TOOLS, marked, plain, tokenizer_with

from jaxgrad import reference
from jaxgrad.data.chat_template import SYSTEM_MESSAGE
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import Protocol, tokenize
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.compare import check_tokens

DAY = "2026-03-05"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]


def user(text):
    return Message("user", text)


def says(text, **more):
    return Message("assistant", text, more)


def conversation(*turns, **values):
    reply = turns[-1]
    return Example(3, "0" * 16, turns[:-1], reply.content, reply if reply.more else None, values)


CONVERSATIONS = {
    "one answer": conversation(user("How long?  12"), says("Five min.\nOr six.")),
    "own system": conversation(Message("system", "Be terse."), user("So?"), says("So.")),
    "two answers": conversation(
        user("How long?"), says(" Five min. "), user("And then?"), says("  Six 42 ")
    ),
    "thoughts": conversation(
        user("12 * 3?"),
        says("36", reasoning_content="ten times three and two times three"),
        user("13 * 3?"),
        says("39", reasoning_content="three more"),
    ),
}
WITH_CALLS = {
    "call answered": conversation(
        user("Rain in Bern?"),
        says("", tool_calls=CALL),
        Message("tool", "rain"),
        says("It rains."),
        tools=TOOLS,
    ),
    "ends with a call": conversation(
        user("Hi"), says("Hello"), user("Rain in Bern?"), says("", tool_calls=CALL), tools=TOOLS
    ),
}
CASES = [(kind, name) for kind in KINDS for name in CONVERSATIONS] + [
    (kind, name) for kind in WITH_TOOLS for name in WITH_CALLS
]
CASES = [case for case in CASES if case != ("Gemma", "own system")]  # which it refuses


def turns_of(example, tokenizer):
    """What transformers gets: the record's turns, behind the authors' system message if that is taken."""
    reply = example.reply or Message("assistant", example.response)
    turns = [{"role": m.role, "content": m.content, **m.more} for m in (*example.messages, reply)]
    if turns[0]["role"] == "system":
        return turns
    system = {"role": "system", "content": SYSTEM_MESSAGE}
    try:
        tokenizer.apply_chat_template([system, *turns[:-1]], tokenize=False)
    except jinja2.TemplateError:
        return turns
    return [system, *turns]


def completion_mask(example, tokenizer):
    """TRL's: the tokens behind those that the rendered prompt and the whole conversation have in common."""
    turns, tools = turns_of(example, tokenizer), example.template_values.get("tools")
    prompt = tokenizer.apply_chat_template(
        turns[:-1], tools=tools, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    whole = tokenizer.apply_chat_template(turns, tools=tools, return_dict=True)["input_ids"]
    pairs = zip(prompt, whole, strict=False)
    common = next((n for n, (one, other) in enumerate(pairs) if one != other), len(prompt))
    return whole, list(range(common, len(whole)))


def assistant_mask(example, tokenizer, template):
    """transformers': the tokens that a template's marks cover."""
    found = tokenizer.apply_chat_template(
        turns_of(example, tokenizer),
        tools=example.template_values.get("tools"),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], [t for t, is_his in enumerate(found["assistant_masks"]) if is_his]


def ours(example, tokenizer, which, count):
    """Our ids and targets, counted as transformers counts `count` of them: without a BOS that was added."""
    item = tokenize(example, tokenizer, Protocol("clean", True, 4096, turns=which))
    assert item.reason is None
    front = item.num_tokens - count
    assert item.token_ids[:front].tolist() == [tokenizer.bos_token_id] * front
    return item.token_ids[front:].tolist(), [t - front for t in item.targets.tolist()]


def drops_a_system_message(kind, example):
    """Whether the prompt has a message that the whole conversation lacks."""
    return kind == "Mistral v3 with tools" and example.messages[-1].role == "user"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_last_turn_is_what_trl_takes_for_the_completion(kind, name):
    example, tokenizer = (CONVERSATIONS | WITH_CALLS)[name], tokenizer_with(plain(kind))
    ids, targets = completion_mask(example, tokenizer)
    own_ids, own_targets = ours(example, tokenizer, "last", len(ids))
    assert own_ids == ids
    if drops_a_system_message(kind, example):
        # TRL's comparison ends at the lost message, and counts the question as an answer. Ours does not.
        assert set(own_targets) < set(targets)
        _, his = assistant_mask(example, tokenizer, marked(kind))
        assert (
            own_targets == [t for t in his if t in own_targets] and own_targets[-1] == targets[-1]
        )
    else:
        assert own_targets == targets


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_all_turns_are_those_that_marks_would_cover(kind, name):
    example, tokenizer = (CONVERSATIONS | WITH_CALLS)[name], tokenizer_with(plain(kind))
    ids, targets = assistant_mask(example, tokenizer, marked(kind))
    own_ids, own_targets = ours(example, tokenizer, "all", len(ids))
    assert own_ids == ids
    if kind == "Phi-3":
        # Without marks, an earlier turn ends where its end differs from that of a last one.
        ends = [t for t in targets if t not in own_targets]
        assert set(own_targets) <= set(targets) and len(ends) <= 1
    else:
        assert own_targets == targets


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_marks_of_the_template_are_followed(kind, name, which):
    example, tokenizer = (CONVERSATIONS | WITH_CALLS)[name], tokenizer_with(marked(kind))
    ids, targets = assistant_mask(example, tokenizer, None)
    own_ids, own_targets = ours(example, tokenizer, which, len(ids))
    assert own_ids == ids
    if which == "last":
        gaps = [t for t in targets if t - 1 not in targets]
        begin = gaps[-1]
        targets = [t for t in targets if t >= begin]
    assert own_targets == targets


@pytest.mark.parametrize("variant", [plain, marked])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_reference_reads_it_alike(kind, name, variant):
    example, tokenizer = (CONVERSATIONS | WITH_CALLS)[name], tokenizer_with(variant(kind))
    for protocol, which in (("paper", "last"), ("clean", "last"), ("clean", "all")):
        options = AnalyzeOptions(
            protocol=protocol, turns=which, chat="yes", max_length=4096, date=DAY
        )
        item = tokenize(example, tokenizer, options.protocol_for(tokenizer))
        check_tokens(item, reference.encode_example(example, tokenizer, options))


# Places that are hard to tell

CLOSES_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' ~ ('\\n' ~ m.reasoning_content if m.reasoning_content else '') ~ '</think>' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def test_where_prompt_and_conversation_part_inside_the_header_the_first_other_token_counts():
    """The prompt opens the thoughts with a line break; the conversation, without thoughts, has none."""
    tokenizer = tokenizer_with(CLOSES_THOUGHTS)
    ids, targets = completion_mask(CONVERSATIONS["one answer"], tokenizer)
    own_ids, own_targets = ours(CONVERSATIONS["one answer"], tokenizer, "last", len(ids))
    assert (own_ids, own_targets) == (ids, targets)
    text = tokenizer.decode([ids[t] for t in targets])
    assert text == "</think>Five min.\nOr six.<|im_end|>\n"


@pytest.mark.parametrize("which", ["last", "all"])
def test_a_place_that_cannot_be_told_is_refused(which):
    """Here a reply changes the turns before it, and the text of these is printed twice."""
    template = (
        "{% if messages[-1].role == 'assistant' %}A{% else %}B{% endif %}"
        "{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}"
    )
    example = conversation(user("a"), says("b"), user("c"), says("d"))
    with pytest.raises(UserError, match=r"record 3: .* cannot tell where it begins; "):
        tokenize(example, tokenizer_with(template), Protocol("clean", True, turns=which))
    # What the message says: with marks it goes.
    covered = template.replace(
        "{{ m.content ~ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content ~ m.content }}{% endif %}",
    )
    item = tokenize(example, tokenizer_with(covered), Protocol("clean", True, turns=which))
    texts = tokenizer_with(covered).decode(item.token_ids[item.targets])
    assert texts == ("dd" if which == "last" else "bbdd")


def test_marks_that_miss_the_answer_are_refused():
    """transformers counts characters while it renders, so marks inside a macro stand at the wrong place."""
    template = (
        "{% macro one(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ m.role ~ ': ' }}"
        "{% if m.role == 'assistant' %}{{ one(m) }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    shifted = template.replace(
        "{% macro one(m) %}", "{% macro one(m) %}{{ 'long words before ' * 9 }}"
    )
    tokenizer = tokenizer_with(shifted)
    with pytest.raises(UserError, match=r"record 3: .* marks do not cover the last turn's text"):
        tokenize(CONVERSATIONS["one answer"], tokenizer, Protocol("clean", True))
    assert tokenize(CONVERSATIONS["one answer"], tokenizer, Protocol("paper", True)).measurable


def test_all_turns_of_a_conversation_without_a_template():
    example = conversation(user("a?"), says("bc"), user("d?"), says("ef"))
    tokenizer = tokenizer_with("")
    item = tokenize(example, tokenizer, Protocol("clean", False, turns="all"))
    assert tokenizer.decode(item.token_ids, skip_special_tokens=True) == "a?\nbc\nd?\nef"
    assert tokenizer.decode(item.token_ids[item.targets]) == "bcef"
    last = tokenize(example, tokenizer, Protocol("clean", False))
    assert tokenizer.decode(last.token_ids[last.targets]) == "ef"


def test_all_turns_go_with_clean_alone():
    with pytest.raises(UserError, match="--turns=all does not go with --protocol=paper"):
        Protocol("paper", turns="all")
    with pytest.raises(UserError, match="--turns=some is unknown; use last or all"):
        Protocol("clean", turns="some")


def test_a_mask_with_gaps_survives_truncation():
    example = conversation(user("How?"), says("So it is."), user("And?"), says("Else."))
    tokenizer = tokenizer_with(plain("Zephyr"))
    whole = tokenize(example, tokenizer, Protocol("clean", True, 4096, turns="all"))
    gap = next(t for t in range(whole.targets[0], whole.num_tokens) if t not in whole.targets)
    for max_length in range(2, whole.num_tokens + 1):
        item = tokenize(example, tokenizer, Protocol("clean", True, max_length, turns="all"))
        left = [t for t in whole.targets.tolist() if t < max_length]
        assert item.targets.tolist() == left
        assert item.reason == (None if left else "prompt fills max_length")
        assert item.num_prompt_tokens + item.num_response_tokens == item.num_tokens
    assert gap < whole.targets[-1]
