"""Files of records: what is read, and what each bad one says."""

import hashlib
import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxgrad.data import tables
from jaxgrad.data.examples import Fields, Message
from jaxgrad.data.read import read_examples
from jaxgrad.errors import UserError

RECORDS = [
    {"instruction": "Add.", "input": "2 + 3", "output": "5"},
    {"instruction": "Größe 😀?", "input": "", "output": "ja\u2028nein"},
    {"instruction": "Say nothing.", "input": None, "output": ""},
    {"instruction": "No input here.", "output": "ok", "source": 7},
    {"instruction": "Add.", "input": "2 + 3", "output": "5"},
]
INSTRUCTIONS = ["Add.\n2 + 3", "Größe 😀?", "Say nothing.", "No input here.", "Add.\n2 + 3"]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]


def json_list(records):
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def json_lines(records):
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode() + b"\n"


def parquet(records):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def write(tmp_path):
    def write(data, name="data.json"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


@pytest.fixture
def refusal(write):
    """The message that reading these bytes raises; one line that names the file."""

    def refusal(data, **kwargs):
        path = write(data)
        with pytest.raises(UserError) as caught:
            read_examples(path, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refusal


# What is read


@pytest.mark.parametrize("encode", [json_list, json_lines, parquet])
def test_formats_agree_whatever_the_suffix(write, encode):
    data = encode(RECORDS)
    for name in ("data.json", "data.jsonl", "data.parquet", "data"):
        path = write(data, name)
        read = read_examples(path)
        assert read.path == path
        assert read.sha256 == hashlib.sha256(data).hexdigest()
        assert read.num_records == len(RECORDS)
        assert [e.index for e in read.examples] == list(range(len(RECORDS)))
        assert [e.instruction for e in read.examples] == INSTRUCTIONS
        assert [e.response for e in read.examples] == [r["output"] for r in RECORDS]
        assert all(len(e.messages) == 1 for e in read.examples)
        assert all(e.messages[0].role == "user" for e in read.examples)
        reference = read_examples(write(json_list(RECORDS), "reference"))
        assert [e.id for e in read.examples] == [e.id for e in reference.examples]


def test_id_follows_content_alone(write):
    examples = read_examples(write(json_list(RECORDS))).examples
    assert examples[0].id == examples[-1].id
    assert len({e.id for e in examples}) == len(RECORDS) - 1
    turn = {"role": "user", "content": "Add.\n2 + 3"}
    same = {"messages": [turn, {"role": "assistant", "content": "5"}]}
    assert read_examples(write(json_lines([same]))).examples[0].id == examples[0].id
    assert all(len(e.id) == 16 and int(e.id, 16) >= 0 for e in examples)
    # The boundary between prompt and response counts, not only their concatenation.
    moved = [{"instruction": "ab", "output": "c"}, {"instruction": "a", "output": "bc"}]
    first, second = read_examples(write(json_list(moved))).examples
    assert first.id != second.id


@pytest.mark.parametrize("encode", [json_list, json_lines, parquet])
def test_messages(write, encode):
    (example,) = read_examples(write(encode([{"messages": CONVERSATION}]))).examples
    assert example.messages == tuple(Message(**turn) for turn in CONVERSATION[:-1])
    assert example.response == "Bye!"
    assert example.instruction == "Be brief.\nHello\nHi\nBye"


@pytest.mark.parametrize("encode", [json_list, parquet])
def test_both_forms_in_one_file(write, encode):
    form = {"instruction": "a", "output": "b"}
    records = [
        form | {"messages": None},
        {"instruction": None, "output": None, "messages": CONVERSATION},
        form | {"messages": CONVERSATION},
    ]
    examples = read_examples(write(encode(records))).examples
    assert [e.response for e in examples] == ["b", "Bye!", "b"]


def test_slice(write):
    path = write(json_lines(RECORDS))
    for start, limit in [(0, 1), (1, 2), (3, 99), (4, None)]:
        read = read_examples(path, start=start, limit=limit)
        expected = range(len(RECORDS))[start:][:limit]
        assert [e.index for e in read.examples] == list(expected)
        assert [e.instruction for e in read.examples] == [INSTRUCTIONS[i] for i in expected]
        assert read.num_records == len(RECORDS)


def test_records_outside_the_slice_are_not_judged(write):
    read = read_examples(write(json_list([*RECORDS, 3])), limit=len(RECORDS))
    assert read.num_records == len(RECORDS) + 1


def test_renamed_fields(write):
    path = write(
        json_list([{"q": "What?", "context": "Here.", "a": "That."}, {"q": "x", "a": "y"}])
    )
    fields = Fields(instruction="q", input="context", output="a")
    examples = read_examples(path, fields=fields).examples
    assert [(e.instruction, e.response) for e in examples] == [
        ("What?\nHere.", "That."),
        ("x", "y"),
    ]


@pytest.mark.parametrize("encode", [json_list, json_lines])
def test_byte_order_mark_and_blank_lines(write, encode):
    plain = read_examples(write(encode(RECORDS)))
    data = b"\xef\xbb\xbf\r\n  \r\n" + encode(RECORDS).replace(b"\n", b"\r\n") + b"\r\n\r\n"
    marked = read_examples(write(data))
    assert marked.examples == plain.examples
    assert marked.sha256 == hashlib.sha256(data).hexdigest()


def test_parquet_ignores_columns_it_does_not_need(write):
    table = pa.table(
        {
            "instruction": ["a"],
            "output": pa.array(["b"]).dictionary_encode(),
            "when": pa.array([2**62 + 1], pa.timestamp("ns", tz="Europe/Berlin")),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    (example,) = read_examples(write(sink.getvalue().to_pybytes())).examples
    assert (example.instruction, example.response) == ("a", "b")


# The file


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        read_examples(tmp_path / "absent.json")
    with pytest.raises(UserError, match="is a directory; name one file"):
        read_examples(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_empty_file(refusal, data):
    assert "data.json: the file is empty" in refusal(data)


@pytest.mark.parametrize("data", [b"[]", b" [ ]\n", parquet([{"output": "x"}][:0])])
def test_no_records(refusal, data):
    assert "the file holds no records" in refusal(data)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8(refusal, mark):
    head = mark + '[{"instruction": "Größe", "output": "'.encode()
    message = refusal(head + "ü".encode("latin-1") + b'"}]')
    assert f"byte 0xfc at byte offset {len(head)};" in message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_broken_json_list_counts_bytes(refusal, mark):
    head = mark + '[{"instruction": "Größe 😀", '.encode()
    data = head + b"oops}]"
    assert f"at byte offset {len(head)} of {len(data)};" in refusal(data)


def test_json_list_cut_in_the_middle(refusal):
    data = json_list(RECORDS)
    cut = data[: data.index(b"ja\xe2\x80\xa8") + 2]
    # json points at the string that is never closed.
    opening = cut.rindex(b'"')
    message = refusal(cut)
    assert f"at byte offset {opening} of {len(cut)};" in message
    assert "Unterminated string" in message and "if it was cut" in message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_broken_json_lines_name_line_and_byte(refusal, mark):
    head = mark + b"\r\n" + json_lines(RECORDS[:3]) + '{"instruction": "ü", "output": '.encode()
    message = refusal(head + b"\n" + json_lines(RECORDS))
    # A blank line, three records, then the broken one; its value is missing where the line ends.
    assert f"at byte offset {len(head)} of " in message
    assert "in line 5;" in message


def test_cut_json_lines(refusal):
    data = json_lines(RECORDS)[:-9]
    assert f"of {len(data)} in line {len(RECORDS)};" in refusal(data)


def test_json_too_deep_or_with_a_huge_number_is_an_error_of_the_file(refusal):
    assert "broken JSON: " in refusal(b"[" * 200_000)
    assert "broken JSON: " in refusal(b'[{"output": ' + b"9" * 5000 + b"}]")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{\n "data": [1]\n}', "an object"),
        (b"42", "a number"),
        (b'"text"\n', "a string"),
        (b"null", "null"),
    ],
)
def test_top_level_is_not_a_list(refusal, data, kind):
    assert f"the top level is {kind}, not a list of records" in refusal(data)


def test_broken_parquet(refusal):
    data = parquet(RECORDS)
    for broken in (data[:-9], data[:4] + bytes(len(data) - 4), b"PAR1"):
        assert f"broken Parquet of {len(broken)} bytes" in refusal(broken)


def test_parquet_that_says_it_has_more_rows_than_anybody_can_hold(refusal):
    table = pa.table({"instruction": pa.nulls(10**8, pa.null()), "output": pa.nulls(10**8)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10**8)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 10**6
    assert "the Parquet file holds 100000000 rows of 2 columns, which is refused" in refusal(data)


def bomb(num_rows, size):
    """One long text, told once and repeated by its place in a dictionary."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int32)), ["x" * size])
    table = pa.table({"instruction": texts, "output": texts})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def test_parquet_that_unpacks_to_more_than_the_limit(refusal, monkeypatch):
    data = bomb(4000, 100_000)  # 800 MB of text
    assert len(data) < 200_000
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10**8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 100000000 bytes of text, which is refused" in refusal(data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 3 * 10**8  # what came before the limit, not all of it


def test_parquet_beyond_one_batch_is_whole(write):
    records = [{"instruction": f"i{k}", "output": f"o{k}"} for k in range(2500)]
    data = read_examples(write(parquet(records)))
    assert [(e.instruction, e.response) for e in data.examples] == [
        (f"i{k}", f"o{k}") for k in range(2500)
    ]


# The slice


def test_slice_out_of_range(refusal):
    data = json_list(RECORDS)
    assert "--start=5 is beyond the end; the file has 5 records" in refusal(data, start=5)
    assert "--start=-1 is negative" in refusal(data, start=-1)
    assert "--limit=0 leaves no record" in refusal(data, limit=0)
    assert "--limit=-2 leaves no record" in refusal(data, limit=-2)


# The records


@pytest.mark.parametrize("encode", [json_list, json_lines])
@pytest.mark.parametrize(
    ("record", "kind"), [(3, "a number"), ("x", "a string"), ([1], "a list"), (None, "null")]
)
def test_record_is_not_an_object(refusal, encode, record, kind):
    message = refusal(encode([*RECORDS, record]))
    assert f"record {len(RECORDS)} is {kind}, not an object" in message


@pytest.mark.parametrize("encode", [json_list, json_lines, parquet])
def test_missing_output_names_the_fields_and_the_flag(refusal, encode):
    records = [{"instruction": "a", "answer": "b"}, {"instruction": "c", "answer": "d"}]
    message = refusal(encode(records), start=1)
    assert "record 1 has no field 'output' (its fields: 'instruction', 'answer')" in message
    assert "--output_field" in message


def test_missing_instruction_and_empty_record(refusal):
    assert "has no field 'instruction' (its fields: 'output')" in refusal(b'[{"output": "x"}]')
    assert "(its fields: none)" in refusal(b"{}")


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize(
    ("value", "kind"), [(5, "a number"), (0.5, "a number"), (True, "a boolean"), (["x"], "a list")]
)
def test_value_is_not_a_string(refusal, field, value, kind):
    message = refusal(json_list([RECORDS[0], RECORDS[0] | {field: value}]))
    assert f"record 1: field {field!r} is {kind}, not a string" in message


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_null_is_not_a_string(refusal, field):
    message = refusal(parquet([RECORDS[0] | {field: None}, RECORDS[0]]))
    assert f"record 0: field {field!r} is null, not a string" in message


def test_parquet_bytes_are_not_a_string(refusal):
    message = refusal(parquet([{"instruction": "a", "output": b"b"}]))
    assert "record 0: field 'output' is of type bytes, not a string" in message


def test_half_a_surrogate_pair(refusal):
    message = refusal(b'[{"instruction": "a", "output": "ab\\ud83d"}]')
    assert "field 'output' holds half a surrogate pair, \\ud83d, at character 2" in message


def test_misspelt_input_field(refusal):
    message = refusal(json_list(RECORDS), fields=Fields(input="inputs"))
    assert "no record has the field 'inputs' that --input_field names" in message


USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "field 'messages' is empty; the last turn must be the assistant's"),
        ([USER], "field 'messages' ends with role 'user'"),
        ([REPLY], "field 'messages' has no user turn"),
        ([{"role": "system", "content": "a"}, REPLY], "has no user turn before the response"),
        ("text", "field 'messages' is a string, not a list"),
        ([USER, "b"], "field 'messages'[1] is a string, not an object"),
        ([{"role": "user"}, REPLY], "[0] has no 'content' (its fields: 'role')"),
        ([{"content": "a"}, REPLY], "[0] has no 'role'"),
        (
            [USER | {"role": "critic"}, REPLY],
            "[0] has role 'critic'; use one of system, user, assistan",
        ),
        ([USER | {"content": {"text": "a"}}, REPLY], "[0]: 'content' is an object, not a string"),
        ([USER, REPLY | {"content": None}], "[1]: 'content' is null, not a string"),
        ([USER | {"role": 3}, REPLY], "[0]: 'role' is a number, not a string"),
    ],
)
def test_bad_messages(refusal, messages, expected):
    good = {"messages": [USER, REPLY]}
    message = refusal(json_list([good, {"messages": messages}]))
    assert "record 1: field 'messages'" in message
    assert expected in message
