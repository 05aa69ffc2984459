"""Kinds of files, compressed ones, directories, the hub: what is read, and what each bad one says."""

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxgrad.data import files, tables
from jaxgrad.data.files import run_name
from jaxgrad.data.read import read_examples
from jaxgrad.errors import UserError

RECORDS = [
    {"instruction": 'Say "hi", twice;', "input": "", "output": "hi\nhi"},
    {"instruction": "Größe 😀?", "input": "x", "output": "ja\u2028nein | vielleicht\t"},
]
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "a"},
]


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        read_examples(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def expected(write):
    return read_examples(write("expected.json", json.dumps(RECORDS))).examples


def csv_bytes(records, **options):
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(records[0]), **options)
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()


def arrow(table, kind="stream", compression=None):
    sink = io.BytesIO()
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def parquet(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


# CSV


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d"])
def test_csv(write, expected, separator, mark, name):
    data = mark.encode() + csv_bytes(RECORDS, delimiter=separator)
    assert b"\r\n" in data
    found = read_examples(write(name, data))
    assert found.examples == expected
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_csv_holds_conversations_as_json_text_and_long_cells(write):
    turns = [{"role": "user", "content": "q" * 300_000}, {"role": "assistant", "content": "a"}]
    before = csv.field_size_limit()
    path = write("d.csv", csv_bytes([{"messages": json.dumps(turns)}]))
    (example,) = read_examples(path).examples
    assert (example.instruction, example.response) == (turns[0]["content"], "a")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("instruction,output\na,b,c\n", "ends in line 2 has 3 cells, the header has 2"),
        ("instruction,output\n\n\na\n", "ends in line 4 has 1 cells, the header has 2"),
        ('instruction,output\na,"b\n', "broken CSV: unexpected end of data (line 2)"),
        ("instruction,output,output\na,b,c\n", "two columns are called 'output'"),
        ("instruction,output\na,b\0\n", "it holds NUL characters"),
        ("instruction,output\n", "the file holds no records"),
        ("question,answer\na,b\n", "--instruction_field=question --output_field=answer"),
        ("instruction,output\na,ü\n".encode("latin-1"), "byte 0xfc at byte offset 21"),
        ("instruction,output\na,b\n".encode("utf-16"), "nor UTF-8 text: byte 0xff"),
    ],
)
def test_bad_csv(write, data, told):
    assert told in refused(write("d.csv", data))


def test_json_under_a_name_of_csv_is_json(write, expected):
    assert read_examples(write("d.csv", json.dumps(RECORDS))).examples == expected
    lines = "\n".join(map(json.dumps, RECORDS))
    assert read_examples(write("d.csv", lines)).examples == expected


# Compressed


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_compressed_by_content_not_by_name(write, expected, pack):
    plain = [json.dumps(RECORDS).encode(), "\n".join(map(json.dumps, RECORDS)).encode()]
    for data in (*plain, csv_bytes(RECORDS), parquet(pa.Table.from_pylist(RECORDS))):
        for name in ("d.json.gz", "d.csv.zst", "d"):
            if data.startswith(b"instruction") or ".csv" not in name:
                found = read_examples(write(name, pack(data)))
                assert found.examples == expected
                assert found.sha256 == hashlib.sha256(pack(data)).hexdigest()
    # Several members behind each other, as parallel packers write them.
    data = json.dumps(RECORDS).encode()
    assert read_examples(write("d", pack(data[:20]) + pack(data[20:]))).examples == expected


@pytest.mark.parametrize(("pack", "codec"), [(gzip.compress, "gzip"), (zstd, "zstd")])
def test_broken_compressed_files(write, pack, codec):
    data = pack(json.dumps(RECORDS).encode())
    for broken in (data[:-9], data[:20], data + b"rest"):
        assert f"broken {codec} of {len(broken)} bytes" in refused(write("d", broken))
    assert "the file is empty" in refused(write("d", pack(b" \n")))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_file_that_unpacks_to_more_than_the_limit(write, monkeypatch, pack):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 10**6)
    assert "more than 1000000 bytes, which is refused" in refused(write("d", pack(bytes(10**7))))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PK\x03\x04...", "a zip archive"),
        (b"BZh91AY", "bunzip2"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x80\x04\x95", "a Python pickle"),
    ],
)
def test_other_kinds_are_named(write, data, told):
    assert told in refused(write("d", data))


# Arrow


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow(write, expected, kind, compression):
    table = pa.Table.from_pylist(RECORDS).append_column("n", pa.array([1, 2]))
    found = read_examples(write("d", arrow(table, kind, compression)))
    assert found.examples == expected
    assert found.notes == ("note: fields that are no part of an example's text: the column 'n'",)


def variants(column):
    texts = pa.array(column)
    return [
        texts.cast(pa.large_string()),
        texts.dictionary_encode(),
        texts.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.large_string())),
        texts.cast(pa.string_view()),
        pa.concat_arrays([pa.array(["x"]), texts]).slice(1),
    ]


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_texts_of_every_type(write, expected, k, kind):
    names = list(RECORDS[0])
    table = pa.table({n: variants([r[n] for r in RECORDS])[k] for n in names})
    assert read_examples(write("d", arrow(table, kind))).examples == expected


LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 4)]


@pytest.mark.parametrize("make", LISTS)
@pytest.mark.parametrize("encode", [parquet, arrow])
def test_a_struct_has_all_keys_and_null_is_an_absent_one(write, make, encode):
    arguments = pa.struct({"x": pa.int64(), "y": pa.string()})
    call = pa.struct({"function": pa.struct({"name": pa.string(), "arguments": arguments})})
    turn = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    table = pa.table({"messages": pa.array([TURNS], make(turn)), "tools": [json.dumps([CALL])]})
    (found,) = read_examples(write("d", encode(table))).examples
    record = {"messages": TURNS, "tools": [CALL]}
    (expected,) = read_examples(write("d.json", json.dumps([record]))).examples
    assert found == expected


def test_maps_and_json_columns_are_objects(write):
    kind = pa.map_(pa.string(), pa.string())
    turns = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]
    column = pa.array([turns], pa.list_(kind))
    (found,) = read_examples(write("d", arrow(pa.table({"messages": column})))).examples
    assert (found.instruction, found.response) == ("q", "a")
    if hasattr(pa, "json_"):
        texts = pa.array([json.dumps(TURNS)], pa.json_(pa.string()))
        for encode in (arrow, parquet):
            path = write("d", encode(pa.table({"messages": texts})))
            (expected,) = read_examples(write("j", json.dumps([{"messages": TURNS}]))).examples
            assert read_examples(path).examples == (expected,)


def test_given_tokens_from_a_table(write):
    columns = {"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]}
    for kind in (pa.int32(), pa.int64(), pa.uint16()):
        ids = pa.array(columns["input_ids"], pa.list_(kind))
        table = pa.table({"input_ids": ids, "labels": columns["labels"]})
        found = read_examples(write("d", parquet(table))).examples
        assert [e.given.token_ids for e in found] == [(1, 2), (3,)]
        assert [e.given.targets for e in found] == [(False, True), (True,)]


def test_arrow_that_is_cut_or_changed(write):
    table = pa.Table.from_pylist(RECORDS)
    for kind in ("stream", "file"):
        data = arrow(table, kind)
        for cut in range(8, len(data), 97):
            assert "broken Arrow" in refused(write("d", data[:cut]))
    # A batch that a cut stream's end would hide.
    assert "its end is missing" in refused(write("d", arrow(table)[:-8]))
    no_footer = arrow(table, "file").replace(b"ARROW1", b"ARROWX")
    assert "broken" in refused(write("d", b"ARROW1" + no_footer[6:]))


def test_arrow_that_unpacks_to_more_than_the_limit(write, monkeypatch):
    table = pa.table({"instruction": ["a"], "output": ["x" * 10**7]})
    data = arrow(table, compression="zstd")
    assert len(data) < 10**4
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10**6)
    assert "more than 1000000 bytes of text, which is refused" in refused(write("d", data))
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int8)), ["x" * 10**4])
    for column in (texts, texts.cast(pa.string()).cast(pa.string_view())):
        data = arrow_whole(pa.table({"instruction": column, "output": column}))
        assert "more than 1000000 bytes" in refused(write("d", data))


def test_arrow_that_claims_what_it_does_not_have(write):
    data = bytearray(arrow(pa.table({"text": ["x" * 5000]}), compression="zstd"))
    # The claim stands in front of the packed bytes.
    at = data.rindex(struct.pack("<q", 5000))
    data[at : at + 8] = struct.pack("<q", 2**50)
    assert "which is refused" in refused(write("d", bytes(data)))


def test_rows_without_bytes_are_counted(write):
    table = pa.table({"text": pa.nulls(2 * 10**8)})
    assert "200000000 rows of 1 columns" in refused(write("d", arrow_whole(table)))


def arrow_whole(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_a_column_of_another_type_is_named(write):
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["x"]))
    assert "column 'text' is of Arrow type run_end_encoded" in refused(
        write("d", arrow_whole(pa.table({"text": runs})))
    )


def test_two_columns_of_a_name(write):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    for encode in (arrow, parquet):
        assert "text" in refused(write("d", encode(table)))


# Directories


def save(folder, shards, **state):
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(shards):05}.arrow" for k in range(len(shards))]
    for name, records in zip(names, shards, strict=True):
        (folder / name).write_bytes(arrow(pa.Table.from_pylist(records)))
    entries = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": entries} | state))
    (folder / "dataset_info.json").write_text("{}")
    return names


def test_a_saved_directory(tmp_path, expected):
    folder = tmp_path / "set"
    names = save(folder, [RECORDS[:1], RECORDS[1:]], _format_columns=None)
    found = read_examples(folder)
    assert found.examples == expected and found.num_records == 2
    digests = (hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names)
    lines = "".join(f"{n} {d}\n" for n, d in zip(names, digests, strict=True))
    assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    for start, limit in [(0, 1), (1, 1), (1, None), (0, 5)]:
        part = read_examples(folder, start=start, limit=limit)
        assert part.examples == expected[start:][:limit]
    assert "--start=2 is beyond the end" in refused(folder, start=2)


def test_a_saved_directory_shows_the_columns_of_its_format(tmp_path):
    records = [{"text": "t", "prompt": "p", "completion": "c"}]
    save(tmp_path / "set", [records], _format_columns=["text"])
    (example,) = read_examples(tmp_path / "set").examples
    assert (example.messages, example.response) == ((), "t")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"_data_files": [{"filename": "../x"}]}, "names no files of this directory"),
        ({"_data_files": []}, "names no files of this directory"),
        ({"_data_files": [{}]}, "is not as datasets' save_to_disk writes it (KeyError"),
        ({"_data_files": 3}, "is not as datasets' save_to_disk writes it"),
        ({"_indices_data_files": [{"filename": "i"}]}, "call flatten_indices()"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: no such file"),
    ],
)
def test_bad_saved_directories(tmp_path, state, told):
    save(tmp_path / "set", [RECORDS], **state)
    assert told in refused(tmp_path / "set")


def test_a_directory_of_splits_names_them(tmp_path, expected):
    folder = tmp_path / "sets"
    save(folder / "train", [RECORDS])
    save(folder / "test", [RECORDS])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    message = refused(folder)
    assert f"holds the splits test, train; name one: {folder / 'test'}" in message
    assert read_examples(folder / "test").examples == expected


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["part-00000-ab12.snappy.parquet", "part-00001-ab12.snappy.parquet"],
        ["0000.parquet", "0001.parquet"],
        ["shard_1", "shard_2"],
    ],
)
def test_numbered_parts(write, tmp_path, expected, names):
    for name, record in zip(names, RECORDS, strict=True):
        write(f"set/{name}", parquet(pa.Table.from_pylist([record])))
    for other in ("README.md", "_SUCCESS", ".crc"):
        write(f"set/{other}", "x")
    assert read_examples(tmp_path / "set").examples == expected


def test_ten_parts_are_in_the_order_of_their_numbers(write, tmp_path):
    for k in range(12):
        write(f"set/part-{k}.jsonl", json.dumps({"text": str(k)}))
    found = read_examples(tmp_path / "set").examples
    assert [example.response for example in found] == [str(k) for k in range(12)]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "is a directory; name one file in it"),
        (["a.json", "b.json"], "name one file in it, such as"),
        (["data.json"], "name one file in it, such as"),
        (["test-00000-of-00001.json", "train-00000-of-00001.json"], "name one file in it, such as"),
        (["train-00000-of-00002.json"], "part 1 of train-* is missing"),
        (
            ["train-00000-of-00003.json", "train-00002-of-00003.json"],
            "part 1 of train-* is missing",
        ),
        (["p1", "p3"], "part 2 of p* is missing"),
        (["p1", "p01"], "two parts have a number"),
    ],
)
def test_other_directories_are_refused(write, tmp_path, names, told):
    (tmp_path / "set").mkdir()
    for name in names:
        write(f"set/{name}", json.dumps(RECORDS))
    assert told in refused(tmp_path / "set")


# The hub


def test_names_of_runs():
    assert run_name("hf:org/name-1.5:train") == "name-1.5-train"
    assert run_name("hf:org/name@v2:main:test") == "name-v2-main-test"
    assert run_name("a/b.jsonl.gz") == run_name(Path("a/b.csv")) == "b"


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:csv", "hf:a/b/c:train", "hf:a/b:c:d:e", "hf:a/b:train[:10]", "hf:../x:t"],
)
def test_names_that_are_no_set_of_the_hub(name):
    assert "names no set of the hub" in refused(name)


def test_a_directory_of_the_sets_name_is_not_read_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "a directory org/name is here" in refused("hf:org/name:train")


READ = """
import sys
from jaxgrad import UserError, read_examples
for name in sys.argv[1:]:
    try:
        data = read_examples(name, start=1, limit=2)
        print(data.num_records, data.sha256, [e.response for e in data.examples], data.notes)
    except UserError as error:
        print(error)
"""


def test_a_set_in_the_hubs_cache_is_read_offline(tmp_path):
    """The library reads its cache: built here as it lays it out."""
    records = [{"text": f"t{k}", "n": k} for k in range(4)]
    folder = tmp_path / "cache" / "org___name" / "main" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(records)
    (folder / "name-train.arrow").write_bytes(arrow(table))
    split = {"name": "train", "num_bytes": 1, "num_examples": 4, "dataset_name": "name"}
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "n": {"dtype": "int64", "_type": "Value"},
    }
    info = {"features": features, "splits": {"train": split}, "builder_name": "parquet"}
    info |= {"dataset_name": "name", "config_name": "main", "version": {"version_str": "0.0.0"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    names = ["hf:org/name:main:train", "hf:org/name:main:test", "hf:org/other:train"]
    done = subprocess.run(
        [sys.executable, "-c", READ, *names],
        env=os.environ
        | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, no_split, no_set = done.stdout.splitlines()
    lines = ('{"text":"t1"}', '{"text":"t2"}')
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert found.startswith(f"4 {digest} ['t1', 't2']") and "the column 'n'" in found
    assert "--data_path=hf:org/name:main:test: datasets cannot give it" in no_split
    assert "--data_path=hf:org/other:train: datasets cannot give it" in no_set
    assert "it is offline" in no_set
