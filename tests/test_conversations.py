"""Conversations with more than text: reasoning, tool calls, tools, dates; and records without any turn."""

import dataclasses
import datetime
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from chat_templates import marked, plain, tokenizer_with
from test_turns import CALL, TOOLS, conversation, says, user

from jaxgrad import reference
from jaxgrad.data import tokens
from jaxgrad.data.examples import Example, GivenTokens, Message
from jaxgrad.data.passages import RENDERED_OTHERWISE
from jaxgrad.data.template_dates import with_date
from jaxgrad.data.tokens import Protocol, count_notes, tokenize, tokenize_all, tokens_digest
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.compare import check_tokens
from jaxgrad.runs.report_lines import note_lines

SHARED = os.environ.get("JAXGRAD_SHARED")
NEEDS_CASES = pytest.mark.skipif(
    not SHARED or not (Path(SHARED) / "cases").exists(), reason="JAXGRAD_SHARED is not set"
)
SYSTEM = Message("system", "Be terse.")
CHATML, QWEN3 = plain("ChatML with tools"), plain("Qwen3")
CASE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DATE_TEMPLATE = (
    "Date: {{ strftime_now('%B %-d, %Y') }}\n{% for m in messages %}{{ m['content'] }};{% endfor %}"
)


def parts(example, template, protocol="paper", **more):
    """The text of the prompt and that of the targets, and the notes. The reference gives the same."""
    tokenizer = tokenizer_with(template)
    options = AnalyzeOptions(protocol=protocol, chat="yes", max_length=4096, **more)
    item = tokenize(example, tokenizer, options.protocol_for(tokenizer))
    check_tokens(item, reference.encode_example(example, tokenizer, options))
    first = item.num_prompt_tokens
    assert item.reason is None and item.targets.tolist() == list(range(first, item.num_tokens))
    prompt, response = (tokenizer.decode(ids) for ids in np.split(item.token_ids, [first]))
    return prompt.removeprefix("<s>"), response, item.notes


def called(function):
    return f"<tool_call>{json.dumps(function)}</tool_call>"


# The kinds of cases that went wrong


def test_reasoning_is_part_of_the_response():
    thoughts = "Ten times three is thirty, two times three is six; together thirty-six."
    example = conversation(
        SYSTEM, user("What is 12 times 3?"), says("36", reasoning_content=thoughts)
    )
    answer = f"<think>\n{thoughts}\n</think>\n\n36"
    for protocol, closing in (("paper", ""), ("clean", "<|im_end|>\n")):
        prompt, response, notes = parts(example, QWEN3, protocol)
        assert response == answer + closing and notes == ()
        assert prompt.endswith("<|im_start|>assistant\n")


def test_a_field_that_is_not_printed_changes_no_text():
    example = conversation(SYSTEM, user("How?"), says("So.", weight=1))
    plainly = conversation(SYSTEM, user("How?"), says("So."))
    for protocol in ("paper", "clean"):
        found, expected = (parts(one, QWEN3, protocol) for one in (example, plainly))
        assert found[:2] == expected[:2]
        named = "the chat template does not print 'weight' of 'assistant' turns"
        assert found[2] == (*expected[2], named)


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_reasoning_by_an_older_name_is_read(name):
    example = conversation(SYSTEM, user("12 * 3?"), says("36", **{name: "ten times three and six"}))
    _, response, notes = parts(example, QWEN3)
    assert response == "<think>\nten times three and six\n</think>\n\n36" and notes == ()


@pytest.mark.parametrize("content", ["", None])
def test_a_final_tool_call_is_the_response(content):
    reply = Message(
        "assistant", "", {"tool_calls": CALL} | ({} if content == "" else {"content": None})
    )
    example = conversation(SYSTEM, user("Weather in Bern?"), reply, tools=TOOLS)
    template = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}")
    call = called({"name": "weather", "arguments": {"city": "Bern"}})
    for protocol, closing in (("paper", ""), ("clean", "<|im_end|>\n")):
        prompt, response, notes = parts(example, template, protocol)
        assert response == call + closing and notes == ()
        assert json.dumps(TOOLS) in prompt


def test_an_earlier_tool_call_is_in_the_prompt():
    example = conversation(
        SYSTEM,
        user("Weather in Bern?"),
        says("", tool_calls=CALL),
        user("rain"),
        says("It rains in Bern."),
    )
    for protocol, closing in (("paper", ""), ("clean", "<|im_end|>\n")):
        prompt, response, notes = parts(example, CHATML, protocol)
        assert called({"name": "weather", "arguments": {"city": "Bern"}}) in prompt
        assert response == "It rains in Bern." + closing and notes == ()


def test_a_reply_that_opens_its_thoughts_as_the_prompt_does():
    answer = "<think>\nTen times three is thirty.\n</think>\n\n36"
    example = conversation(Message("system", "s"), user("What is 12 times 3?"), says(answer))
    prompt, response, notes = parts(example, CASE_TEMPLATE, "clean")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n") and prompt.count("<think>") == 1
    assert response == answer.removeprefix("<think>\n") + "<|im_end|>\n" and notes == ()
    # The authors' text has it twice, and the run says so.
    prompt, response, notes = parts(example, CASE_TEMPLATE)
    assert (prompt + response).endswith("<think>\n" + answer)
    assert notes == (RENDERED_OTHERWISE,)


@NEEDS_CASES
@pytest.mark.parametrize(
    "name", ["reasoning_content", "final_turn_is_a_tool_call", "earlier_tool_call"]
)
def test_the_shared_cases_give_the_same(name):
    from jaxgrad import read_examples

    (example,) = read_examples(Path(SHARED) / "cases" / name / "d.json").examples
    prompt, response, notes = parts(example, QWEN3, "clean")
    call = called({"name": "weather", "arguments": {"city": "Bern"}})
    answers = {
        "reasoning_content": "<think>\nTen times three is thirty, two times three is six; together "
        "thirty-six.\n</think>\n\n36",
        "final_turn_is_a_tool_call": "<think>\n\n</think>\n\n" + call,
        "earlier_tool_call": "<think>\n\n</think>\n\nIt rains in Bern.",
    }
    assert response == answers[name] + "<|im_end|>\n" and notes == ()
    assert (call in prompt) == (name == "earlier_tool_call")


@NEEDS_CASES
def test_the_shared_cases_of_templates_and_columns_give_the_same():
    from jaxgrad import read_examples

    cases = Path(SHARED) / "cases"
    (tools,) = read_examples(cases / "tools_column" / "d.json").examples
    assert json.dumps(tools.template_values["tools"]) in parts(tools, CHATML)[0]
    (null,) = read_examples(cases / "final_turn_is_a_tool_call" / "null_content.jsonl").examples
    assert parts(null, CHATML)[1] == "It rains."
    opens = cases / "generation_prompt_opens_think"
    template = (opens / "chat_template.jinja").read_text()
    (example,) = read_examples(opens / "d.json").examples
    assert parts(example, template, "clean")[1] == (
        "Ten times three is thirty.\n</think>\n\n36<|im_end|>\n"
    )
    template = (cases / "date_formats" / "chat_template.jinja").read_text()
    assert parts(example, template, date="2026-03-05")[0].startswith("Date: March 5, 2026\n")


# Dates


@pytest.mark.parametrize("day", ["2026-03-05", "2024-12-31"])
def test_all_of_strftime(day):
    date = datetime.date.fromisoformat(day)
    formats = [
        f"%{flag}{letter}"
        for flag in ("", "-", "_", "0", "^", "#")
        for letter in "aAbBdejmuUVwWxyYGgCDF"
    ]
    formats += [
        "%B %-d, %Y",
        "100%% of %j",
        "%%d is %d",
        "%d%m%Y",
        "%H:%M:%S",
        "%Ey",
        "%Od",
        "%q%n",
    ]
    template = "".join(f"{{{{ strftime_now({each!r}) }}}};;" for each in formats)
    text = tokenizer_with(with_date(template, date)).apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False
    )
    moment = datetime.datetime(date.year, date.month, date.day)
    assert text.split(";;") == [*(moment.strftime(each) for each in formats), ""]


def test_a_date_in_a_record():
    example = conversation(SYSTEM, user("a"), says("b"))
    prompt, response, _ = parts(example, DATE_TEMPLATE, date="2026-03-05")
    assert (prompt, response) == ("Date: March 5, 2026\nBe terse.;a;", "b")


@pytest.mark.parametrize(
    "start", ["  {% if true %}a{% endif %}", "\n\n b", "{{- 'c' }}", "{#- x #}\n d"]
)
def test_the_date_leaves_the_rest_of_a_template_alone(start):
    template = start + "{% if strftime_now is defined %} {{ strftime_now('%Y') }}{% endif %}\n"
    turns = [{"role": "user", "content": ""}]
    dated = tokenizer_with(with_date(template, datetime.date(2020, 1, 2)))
    today = tokenizer_with(template).apply_chat_template(turns, tokenize=False)
    assert dated.apply_chat_template(turns, tokenize=False) == today.replace(
        f"{datetime.date.today().year}", "2020"
    )


# What a template leaves out


def notes_of(example, template, protocol="paper"):
    item = tokenize(example, tokenizer_with(template), Protocol(protocol, True, 4096))
    return [note for note in item.notes if note != RENDERED_OTHERWISE]


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_what_is_not_printed_is_named(protocol):
    zephyr = plain("Zephyr")
    example = conversation(
        Message("user", "Hi", {"name": "Ann", "weight": None, "tags": []}),
        says("Yo", tool_calls=CALL, reasoning_content="a long thought of many words"),
        tools=TOOLS,
        documents=None,
    )
    assert notes_of(example, zephyr, protocol) == [
        "the chat template does not print 'name' of 'user' turns",
        "the chat template does not print 'reasoning_content' of 'assistant' turns",
        "the chat template does not print 'tool_calls' of 'assistant' turns",
        "the chat template does not read the record's 'tools'",
    ]
    dumps = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools }}"
    assert notes_of(example, dumps, protocol) == []


def test_thoughts_that_the_template_drops_are_named_and_those_it_prints_are_not():
    example = conversation(
        user("a?"),
        says("b", reasoning_content="the first of two long thoughts"),
        user("c?"),
        says("d", reasoning_content="the second of two long thoughts"),
    )
    dropped = "the chat template does not print 'reasoning_content' of 'assistant' turns"
    assert notes_of(example, QWEN3) == [dropped]
    last = conversation(*example.messages[:1], says("b"), user("c?"), example.reply)
    assert notes_of(last, QWEN3) == []


def test_a_text_that_the_template_drops_is_named():
    example = conversation(SYSTEM, user("a"), says("b"))
    template = plain("Mistral v3 with tools")
    assert notes_of(example, template) == []
    assert notes_of(example, template, "clean") == [
        "the chat template drops or changes the text of 'system' turns"
    ]


def test_arguments_as_json_text_are_handed_over_as_they_are():
    as_text = [{"type": "function", "function": {"name": "w", "arguments": '{"city": "Bern"}'}}]
    example = conversation(SYSTEM, user("a"), says("", tool_calls=as_text))
    _, response, notes = parts(example, CHATML)
    assert response == called({"name": "w", "arguments": '{"city": "Bern"}'})
    assert len(notes) == 1 and "once more as JSON" in notes[0]
    joined = CHATML.replace("(call.function | tojson)", "call.function.arguments")
    assert parts(example, joined)[1:] == ('<tool_call>{"city": "Bern"}</tool_call>', ())
    as_object = conversation(SYSTEM, user("a"), says("", tool_calls=CALL))
    concatenates = CHATML.replace("(call.function | tojson)", "('' + call.function.arguments)")
    with pytest.raises(
        UserError, match="some templates want `arguments` as an object, some as JSON"
    ):
        tokenize(as_object, tokenizer_with(concatenates), Protocol("clean", True))


def test_plain_text_names_what_it_leaves_out():
    example = conversation(user("a"), says("b", tool_calls=CALL), user("c"), says("d"), tools=TOOLS)
    item = tokenize(example, tokenizer_with(""), Protocol())
    assert item.notes == (
        "plain text leaves out 'tool_calls' of 'assistant' turns",
        "plain text leaves out the record's 'tools'",
    )


def test_notes_are_counted():
    named = conversation(Message("user", "Hi", {"name": "Ann"}), says("Yo"))
    without = conversation(user("Hi"), says("Yo"))
    tokenizer = tokenizer_with(plain("Zephyr"))
    items = tokenize_all([named, without, named, named, named], tokenizer, Protocol("paper", True))
    note = "the chat template does not print 'name' of 'user' turns"
    assert count_notes(items) == {note: 4}
    assert note_lines(SimpleNamespace(tokenized=items)) == [f"of 5 examples, 4: {note}"]


def test_a_reply_of_which_nothing_is_rendered_is_empty():
    example = conversation(user("Hi"), says("", tool_calls=CALL))
    for protocol in ("paper", "clean"):
        item = tokenize(example, tokenizer_with(plain("Zephyr")), Protocol(protocol, True))
        assert item.reason == tokens.EMPTY_RESPONSE and item.num_response_tokens == 0
    said = conversation(user("Hi"), says("Hello"), user("Hi"), says(""))
    item = tokenize(said, tokenizer_with(plain("Zephyr")), Protocol("clean", True, turns="all"))
    assert item.measurable


@pytest.mark.parametrize("name", ["chat_template", "add_generation_prompt", "messages", "tokenize"])
def test_a_record_does_not_choose_its_template(name):
    example = conversation(user("Hi"), says("Yo"), **{name: "{{ 1 }}"})
    with pytest.raises(UserError, match=f"record 3 gives the chat template a value '{name}'"):
        tokenize(example, tokenizer_with(CHATML), Protocol("paper", True))


def test_values_of_a_record_reach_the_template():
    template = "{{ mood }}{{ documents | tojson }}" + CHATML
    example = conversation(SYSTEM, user("Hi"), says("Yo"), mood="calm", documents=[{"text": "t"}])
    prompt, _, notes = parts(example, template)
    assert prompt.startswith('calm[{"text": "t"}]') and notes == ()


def test_a_developer_s_message_is_the_record_s_own_system_message():
    prompt, _, _ = parts(conversation(Message("developer", "d"), user("u"), says("a")), CHATML)
    assert prompt.startswith("<|im_start|>developer\nd") and "helpful" not in prompt


# Plain text, tokens that were given


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_of_plain_text_all_tokens_are_targets_but_the_first(protocol, chat):
    tokenizer = tokenizer_with(CHATML)
    example = Example(0, "0" * 16, (), "How long? So.")
    item = tokenize(example, tokenizer, Protocol(protocol, chat))
    options = AnalyzeOptions(protocol=protocol, chat="yes" if chat else "no", max_length=1024)
    check_tokens(item, reference.encode_example(example, tokenizer, options))
    assert tokenizer.decode(item.token_ids) == "<s>How long? So."
    assert item.targets.tolist() == list(range(1, item.num_tokens))
    empty = tokenize(Example(0, "0" * 16, (), ""), tokenizer, Protocol(protocol, chat))
    assert empty.reason == tokens.EMPTY_RESPONSE


def given(ids, targets):
    return Example(5, "0" * 16, (), "", given=GivenTokens(tuple(ids), tuple(map(bool, targets))))


@pytest.mark.parametrize(
    ("targets", "max_length", "left", "reason"),
    [
        ([0, 1, 0, 1, 1], 9, [1, 3, 4], None),
        ([1, 1, 0, 0, 0], 9, [1], None),
        ([0, 1, 0, 1, 1], 4, [1, 3], None),
        ([0, 0, 0, 0, 1], 4, [], tokens.PROMPT_FILLS),
        ([1, 0, 0, 0, 0], 9, [], tokens.NO_RESPONSE_TOKEN),
        ([0, 0, 0, 0, 0], 4, [], tokens.NO_RESPONSE_TOKEN),
    ],
)
def test_given_tokens_are_taken_as_they_are(targets, max_length, left, reason):
    example = given([5, 6, 7, 8, 9], targets)
    item = tokenize(example, None, Protocol("paper", True, max_length))
    assert item.token_ids.tolist() == [5, 6, 7, 8, 9][:max_length]
    assert item.targets.tolist() == left and item.reason == reason
    assert item.truncated == (max_length < 5)
    assert item.notes == ((tokens.FIRST_IS_TARGET,) if targets[0] else ())
    tokenizer = tokenizer_with(CHATML)
    options = AnalyzeOptions(max_length=max_length)
    check_tokens(item, reference.encode_example(example, tokenizer, options))


@pytest.mark.parametrize("token", [-1, 2**31])
def test_a_given_token_that_is_none_is_refused(token):
    with pytest.raises(UserError, match=f"record 5: token 1 is {token}, which is no token's id"):
        tokenize(given([3, token], [0, 1]), None, Protocol())


def test_the_digest_tells_targets_with_gaps_apart():
    one, other, end = (
        [tokenize(given([3, 4, 5, 6], targets), None, Protocol())]
        for targets in ([0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1])
    )
    assert len({tokens_digest(items) for items in (one, other, end)}) == 3


def test_marks_make_gaps_that_the_reference_reads_too():
    template = marked("ChatML with tools")
    example = conversation(SYSTEM, user("a?"), says("bc"), user("d?"), says("ef"))
    tokenizer = tokenizer_with(template)
    options = AnalyzeOptions(protocol="clean", turns="all", chat="yes", max_length=4096)
    item = tokenize(example, tokenizer, options.protocol_for(tokenizer))
    check_tokens(item, reference.encode_example(example, tokenizer, options))
    assert tokenizer.decode(item.token_ids[item.targets]) == "bc<|im_end|>\nef<|im_end|>\n"


def test_targets_with_gaps_are_measured_as_in_pytorch(tmp_path):
    """Loss and gradients of given tokens, of all turns of a conversation and of plain text."""
    tiny = tiny_models.Tiny(2, 1, tied=True, width=14, head_size=6, mlp_width=11, num_layers=2)
    directory = str(tiny_models.save_tiny(tiny, tmp_path))
    examples = [
        given([5, 6, 7, 8, 9, 10, 11], [0, 0, 1, 0, 0, 1, 0]),
        dataclasses.replace(conversation(user("a?"), says("bc"), user("d?"), says("ef")), index=6),
        Example(7, "0" * 16, (), "so it is"),
    ]
    options = AnalyzeOptions(
        protocol="clean", turns="all", chat="no", max_length=32, parameters="q_proj|o_proj"
    )
    found = reference.compare_with_torch(
        directory, examples, options, say=lambda line: None, progress=False
    )
    assert found.beyond(reference.default_tolerances("float32")) == []
    assert found["loss"].count == 3
