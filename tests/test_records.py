"""Kinds of records: what each becomes, how it is recognized, and what a bad one says."""

import json
import os
import re
from pathlib import Path

import pytest

from jaxgrad.data.chat_template import as_turn
from jaxgrad.data.examples import Fields, GivenTokens, Message
from jaxgrad.data.read import read_examples
from jaxgrad.data.records import KINDS
from jaxgrad.errors import UserError

USER, REPLY = Message("user", "q"), Message("assistant", "a")
SYSTEM = Message("system", "s")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def read(tmp_path):
    def read(*records, **options):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        return read_examples(path, **options)

    return read


@pytest.fixture
def one(read):
    """The example of one record."""
    return lambda record, **options: read(record, **options).examples[0]


@pytest.fixture
def refusal(read):
    def refusal(*records, **options):
        with pytest.raises(UserError) as caught:
            read(*records, **options)
        message = str(caught.value)
        assert "\n" not in message and "data.json" in message
        return message

    return refusal


def turns_of(example):
    """All turns, the response's last, as (role, content)."""
    reply = example.reply or Message("assistant", example.response)
    assert reply.content == example.response
    return [(turn.role, turn.content) for turn in (*example.messages, reply)]


# Each kind


def test_alpaca_with_system_and_history(one):
    record = {"instruction": "i", "input": "x", "output": "o", "system": "s"}
    example = one(record | {"history": [["q1", "a1"], ["q2", "a2"]]})
    earlier = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert turns_of(example) == [
        ("system", "s"),
        *earlier,
        ("user", "i\nx"),
        ("assistant", "o"),
    ]
    plain = {"instruction": "i", "output": "o"}
    for empty in ({"system": ""}, {"system": None}, {"history": []}, {"history": None}):
        assert one(plain | empty) == one(plain)


def test_sharegpt(one):
    spoken = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    example = one({"conversations": spoken, "tools": json.dumps([CALL])})
    assert example.messages == (
        SYSTEM,
        USER,
        Message("assistant", "", {"tool_calls": [CALL], "content": None}),
        Message("tool", "1"),
    )
    assert (example.response, example.reply) == ("a", None)
    assert example.template_values == {"tools": [CALL]}
    outside = one({"conversations": spoken[1:], "tools": json.dumps([CALL]), "system": "s"})
    assert outside == example


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("speaker", "text"), [("role", "content"), ("from", "value")])
def test_the_spelling_of_turns_is_free_of_the_fields_name(one, field, speaker, text):
    record = {field: [{speaker: "user", text: "q"}, {speaker: "assistant", text: "a"}]}
    assert one(record) == one({"messages": TURNS})


def test_prompt_and_completion_as_texts_have_nothing_between_them(read):
    data = read({"prompt": "2 + 2 =", "completion": " 4"})
    (example,) = data.examples
    assert turns_of(example) == [("user", "2 + 2 ="), ("assistant", " 4")]
    assert example.joint == ""
    assert any("--chat=no" in line for line in data.lines)
    # With a line end between them it is another example.
    (alpaca,) = read({"instruction": "2 + 2 =", "output": " 4"}).examples
    assert alpaca.joint == "\n" and alpaca.id != example.id


@pytest.mark.parametrize("prompt", ["q", TURNS[:1], TURNS[0]])
@pytest.mark.parametrize("completion", ["a", TURNS[1:], TURNS[1]])
def test_prompt_and_completion_with_turns_are_a_conversation(one, prompt, completion):
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    assert one({"prompt": prompt, "completion": completion}) == one({"messages": TURNS})


def test_a_completion_of_several_turns_is_told(read):
    data = read({"prompt": TURNS, "completion": TURNS})
    assert turns_of(data.examples[0]) == [("user", "q"), ("assistant", "a")] * 2
    assert any("its last one is measured (1 record)" in line for line in data.lines)


def conversation(text):
    return [TURNS[0], {"role": "assistant", "content": text}]


PREFERENCES = {
    "turns": ({"prompt": TURNS[:1]}, lambda text: conversation(text)[1:]),
    "text_and_turns": ({"prompt": "q"}, lambda text: conversation(text)[1:]),
    "implicit": ({}, conversation),
    "implicit_with_text": ({"prompt": "q"}, conversation),
    "repeated": ({"prompt": TURNS[:1]}, conversation),
    "one_turn": (
        {"conversations": [{"from": "human", "value": "q"}]},
        lambda text: {"from": "gpt", "value": text},
    ),
    "messages": ({"messages": TURNS[:1]}, lambda text: conversation(text)[1:]),
    "alpaca": ({"instruction": "q"}, lambda text: text),
}


@pytest.mark.parametrize("form", PREFERENCES)
@pytest.mark.parametrize("response", ["chosen", "rejected"])
def test_a_preference_is_the_conversation_with_its_response(one, form, response):
    prompt, write = PREFERENCES[form]
    record = prompt | {"chosen": write("yes"), "rejected": write("no")}
    expected = one({"messages": conversation({"chosen": "yes", "rejected": "no"}[response])})
    assert one(record, response=response) == expected


def test_a_preference_of_texts(one):
    record = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    for response in ("chosen", "rejected"):
        same = {"prompt": "q", "completion": record[response]}
        assert one(record, response=response) == one(same)


def test_the_prompt_of_two_texts_is_what_they_have_in_common(one):
    record = {"chosen": "Human: hi Bot: good day", "rejected": "Human: hi Bot: go away"}
    chosen, rejected = (one(record, response=name) for name in ("chosen", "rejected"))
    assert chosen.messages == rejected.messages == (Message("user", "Human: hi Bot: go"),)
    assert (chosen.response, rejected.response, chosen.joint) == ("od day", " away", "")
    # A last space belongs to the responses, as in TRL.
    example = one({"chosen": "Bot: yes", "rejected": "Bot: no"}, response="rejected")
    assert (example.instruction, example.response) == ("Bot:", " no")


def test_text(one):
    example = one({"text": "All of it."})
    assert (example.messages, example.response) == ((), "All of it.")


GIVEN = {"input_ids": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("fields", "begin", "targets"),
    [
        ({}, 0, [1, 1, 1, 1]),
        ({"labels": [-100, 6, -100, 8]}, 0, [0, 1, 0, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, 0, [0, 1, 0, 1]),
        ({"completion_mask": [False, False, True, True]}, 0, [0, 0, 1, 1]),
        ({"loss_mask": [0, 0, 1, 1], "labels": [5, 6, 7, -100]}, 0, [0, 0, 1, 0]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, 0, [0, 1, 0, 1]),
        ({"attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, -100]}, 0, [1, 1, 1]),
        ({"attention_mask": [0, 0, 1, 1], "position_ids": [0, 0, 0, 1]}, 2, [1, 1]),
        ({"position_ids": [0, 1, 2, 3], "seq_lengths": [4]}, 0, [1, 1, 1, 1]),
        ({"labels": None, "loss_mask": [0, 0, 0, 0]}, 0, [0, 0, 0, 0]),
    ],
)
def test_tokens(one, fields, begin, targets):
    ids = tuple(GIVEN["input_ids"][begin : begin + len(targets)])
    example = one(GIVEN | fields)
    assert example.given == GivenTokens(ids, tuple(map(bool, targets)))
    assert (example.messages, example.response) == ((), "")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"labels": [6, 7, 8, -100]}, "labels must not be shifted"),
        ({"labels": [5, 9, 7, 8]}, "'labels'[1] is 9, and the token there is 6;"),
        ({"labels": [5, 6]}, "'labels' has 2 numbers, 'input_ids' has 4"),
        ({"loss_mask": [0, 0.5, 1, 1]}, "'loss_mask' is a list with a number in it"),
        ({"loss_mask": [0, 2, 1, 1]}, "'loss_mask' has other numbers than 0 and 1"),
        ({"attention_mask": [1, 0, 1, 1]}, "'attention_mask' has zeros between ones"),
        ({"attention_mask": [0, 0, 0, 0]}, "has no token that is not padding"),
        ({"position_ids": [0, 1, 0, 1]}, "'position_ids' says that several texts are packed"),
        ({"seq_lengths": [2, 2]}, "'seq_lengths' says that several texts are packed"),
        ({"input_ids": [[5, 6]]}, "'input_ids' is a list with a list in it"),
        ({"input_ids": "5 6"}, "'input_ids' is a string, not a list"),
        ({"input_ids": [5, -1]}, "'input_ids' has a number that is no token's"),
        ({"input_ids": []}, "has no token that is not padding"),
    ],
)
def test_bad_tokens(refusal, fields, told):
    assert told in refusal(GIVEN | fields)


# Turns


def test_what_else_a_turn_holds_stays_with_it(one):
    turns = [
        {"role": "developer", "content": "s", "name": "boss"},
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "assistant", "content": "a", "reasoning_content": "why", "thinking": None},
    ]
    example = one({"messages": turns})
    assert example.messages == (
        Message("developer", "s", {"name": "boss"}),
        USER,
        Message("assistant", "", {"tool_calls": [CALL], "content": None}),
        Message("tool", "1", {"tool_call_id": "c"}),
    )
    assert example.reply == Message("assistant", "a", {"reasoning_content": "why"})
    assert example.response == "a"
    without = [turn for turn in turns[:-1]] + [{"role": "assistant", "content": "a"}]
    assert one({"messages": without}).id != example.id


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_the_last_turn_may_be_a_call(one, content):
    example = one({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL]} | content]})
    assert example.response == ""
    null = (
        {} if content.get("content") == "" else {"content": None}
    )  # a template may tell them apart
    assert example.reply == Message("assistant", "", {"tool_calls": [CALL]} | null)


def test_texts_in_parts_are_put_together(one):
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": " r", "image": None}]
    example = one({"messages": [{"role": "user", "content": parts}, TURNS[1]]})
    assert example.messages == (Message("user", "q r"),)


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (
            {"role": "user", "content": [{"type": "image", "url": "x"}]},
            "'content'[0] is of type 'image'",
        ),
        ({"role": "user", "content": ["q"]}, "'content'[0] is a string"),
        ({"from": "narrator", "value": "q"}, "role 'narrator'; use one of human, gpt"),
        ({"from": "human"}, "has no 'value' (its fields: 'from')"),
        ({"from": "function_call", "value": "go"}, "whose value is no call"),
    ],
)
def test_bad_turns(refusal, turn, told):
    assert told in refusal({"messages": [turn, *TURNS]})


def test_a_system_message_stands_once(one, refusal):
    turns = [{"role": "system", "content": "s"}, *TURNS]
    for record in ({"messages": turns, "system": "s"}, {"messages": TURNS, "system_prompt": "s"}):
        assert one(record).messages == (SYSTEM, USER)
    assert "two system messages" in refusal({"messages": turns, "system": "other"})


def test_what_a_template_reads_besides_the_turns(one, refusal):
    documents = [{"title": "t", "text": "d"}]
    more = {"documents": documents, "chat_template_kwargs": {"enable_thinking": False}}
    example = one({"messages": TURNS, "tools": [json.dumps(CALL)]} | more)
    assert example.template_values == {
        "tools": [CALL],
        "documents": documents,
        "enable_thinking": False,
    }
    assert example.id != one({"messages": TURNS}).id
    assert one({"messages": TURNS, "tools": None}) == one({"messages": TURNS, "tools": ""})
    assert "'tools' is a string, not a list" in refusal({"messages": TURNS, "tools": "f(x)"})
    replaced = {"messages": TURNS, "chat_template_kwargs": {"chat_template": "x"}}
    assert "sets 'chat_template'" in refusal(replaced)


# Which kind


RECORDS = {
    "alpaca": {"instruction": "q", "output": "a"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": TURNS},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "completion": {"prompt": "q", "completion": "a"},
    "tokens": GIVEN,
    "text": {"text": "a"},
}


def test_every_kind_has_a_record_here():
    assert list(RECORDS) == [kind.name for kind in KINDS]


@pytest.mark.parametrize("name", RECORDS)
def test_the_kind_is_recognized_told_and_can_be_named(read, name):
    options = {"response": "chosen"} if name == "preference" else {}
    kind = next(kind for kind in KINDS if kind.name == name)
    found = read(RECORDS[name], **options)
    assert f"1 record, kind: {kind.title}" in found.lines[0]
    assert read(RECORDS[name], data_format=name, **options) == found
    oldest = name in ("alpaca", "messages")
    assert found.choice == ({} if oldest else {"kind": name}) | options


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("asked", RECORDS)
def test_a_wrong_name_is_told_the_right_one(refusal, name, asked):
    if name == asked:
        return
    message = refusal(RECORDS[name], data_format=asked, response=None)
    assert f"give --data_format={name}" in message or "--response=" in message


@pytest.mark.parametrize(
    ("record", "kind", "unread"),
    [
        (RECORDS["alpaca"] | {"text": "t", "messages": TURNS}, "alpaca", ["text", "messages"]),
        (RECORDS["messages"] | RECORDS["preference"], "messages", ["chosen", "rejected", "prompt"]),
        (RECORDS["text"] | GIVEN, "tokens", ["text"]),
        (RECORDS["completion"] | {"label": True}, "completion", ["label"]),
    ],
)
def test_where_a_record_has_two_kinds_the_rest_is_named(read, record, kind, unread):
    data = read(record, record | {name: None for name in unread})
    assert data.kind == next(k.title for k in KINDS if k.name == kind)
    (line,) = [line for line in data.lines if "no part of an example's text" in line]
    assert all(f"{name!r} in 1 record" in line for name in unread)


def test_a_file_has_one_kind(refusal):
    message = refusal(RECORDS["text"], RECORDS["text"], RECORDS["completion"])
    assert "record 2 is of another kind" in message and "{prompt, completion}" in message


def test_a_record_without_any_kind_takes_the_others_and_is_refused(refusal):
    message = refusal(RECORDS["sharegpt"], {"conversations": None, "id": 3})
    assert "record 1: field 'conversations' is null, not a list" in message


@pytest.mark.parametrize(
    ("record", "mend"),
    [
        ({"question": "q", "answer": "a"}, {"instruction": "question", "output": "answer"}),
        ({"prompt": "q", "response": "a"}, {"instruction": "prompt", "output": "response"}),
        ({"instruction": "q", "answer": "a"}, {"output": "answer"}),
    ],
)
def test_the_mend_that_a_refusal_names_works(refusal, one, record, mend):
    message = refusal(record)
    assert all(f"--{name}_field={field}" in message for name, field in mend.items())
    assert one(record, fields=Fields(**mend)) == one(RECORDS["alpaca"])


def test_a_question_beside_two_responses_does_not_get_lost(refusal, one):
    record = {"question": "q", "chosen": "The one", "rejected": "The other"}
    assert "--instruction_field=question" in refusal(record, response="chosen")
    example = one(record, response="chosen", fields=Fields(instruction="question"))
    assert turns_of(example) == [("user", "q"), ("assistant", "The one")]


@pytest.mark.parametrize(
    ("records", "options", "told"),
    [
        ([RECORDS["preference"]], {}, "give --response=chosen or --response=rejected"),
        ([RECORDS["text"]], {"response": "chosen"}, "leave the flag out"),
        ([{"id": 1, "data": RECORDS["alpaca"]}], {}, "'data' holds such records: write that obj"),
        ([{"id": 1, "rows": [RECORDS["text"]]}], {}, "'rows' holds such records: write that list"),
        ([{"label": 1}], {}, "known kinds: {instruction, input, output}, {messages:"),
        (
            [{"chosen": "yes", "rejected": "no"}],
            {"response": "chosen"},
            "no field 'prompt'",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": TURNS}],
            {"response": "chosen"},
            "one response is text, the other has turns",
        ),
        ([RECORDS["alpaca"] | {"history": [["q"]]}], {}, "'history'[0] is not a pair"),
    ],
)
def test_refusals(refusal, records, options, told):
    assert told in refusal(*records, **options)


def test_unknown_choices(read):
    with pytest.raises(UserError, match="--data_format=llama is unknown; use auto, alpaca,"):
        read(RECORDS["text"], data_format="llama")
    with pytest.raises(UserError, match="--response=best is unknown; use chosen or rejected"):
        read(RECORDS["preference"], response="best")


# Shared cases


def test_the_shared_cases_keep_all_that_a_template_can_print():
    root = Path(os.environ.get("JAXGRAD_SHARED", "nowhere")) / "cases"
    if not root.exists():
        pytest.skip("set JAXGRAD_SHARED to the folder with cases/")
    for folder in ("reasoning_content", "final_turn_is_a_tool_call", "earlier_tool_call"):
        for path in (root / folder).iterdir():
            text = path.read_text("utf-8")
            (record,) = json.loads(text) if text.startswith("[") else [json.loads(text)]
            (example,) = read_examples(path).examples
            reply = example.reply or Message("assistant", example.response)
            for turn, kept in zip(record["messages"], (*example.messages, reply), strict=True):
                known = ("role",) if turn["content"] is None else ("role", "content")
                rest = {k: v for k, v in turn.items() if k not in known}
                assert kept == Message(turn["role"], turn["content"] or "", rest)
    (record,) = json.loads((root / "tools_column" / "d.json").read_text("utf-8"))
    (example,) = read_examples(root / "tools_column" / "d.json").examples
    assert example.template_values == {"tools": record["tools"]}


# The page


def test_the_page_shows_a_record_of_every_kind(read):
    page = Path(__file__).resolve().parent.parent / "docs" / "data.md"
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", page.read_text("utf-8"), re.MULTILINE))
    assert list(rows) == [kind.name for kind in KINDS]
    for kind in KINDS:
        data = read(
            json.loads(rows[kind.name]), response="chosen" if kind.name == "preference" else None
        )
        assert data.kind.startswith(kind.title)


# What results keep of a reply


def test_results_keep_all_of_a_reply(one):
    """Two tool calls that differ are not the same empty text."""
    asked = {"role": "user", "content": "q"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    kept = one({"messages": [asked, call]}).reply_text
    assert json.loads(kept) == {"tool_calls": [CALL]}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    kept = one({"messages": [asked, thought]}).reply_text
    assert kept == 'a\n{"reasoning_content": "hm"}'
    assert one({"messages": TURNS}).reply_text == "a"


def test_null_content_is_an_absent_key_for_the_template(one):
    """transformers hands no null to a template; "" would be another thing to some."""
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    example = one({"messages": [{"role": "user", "content": "q"}, call]})
    assert as_turn(example.reply) == {"role": "assistant", "tool_calls": [CALL]}
