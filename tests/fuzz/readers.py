"""The readers of untrusted files, each as a function of one file's bytes.

`Reader.one_input` writes the bytes to a file, calls the reader as the program does, and returns whether the
file was read or refused (a `UserError` of one short line). What was read is compared with a second, simple
reading if there is one. Anything else is a find.
"""

import copy
import dataclasses
import functools
import io
import json
import math
import random
import struct
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import checkpoint_files
import gguf_files
import gguf_tokenizers
import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import tiny_models
from mutations import (
    mutate_bytes,
    mutate_json_file,
    mutate_json_lines,
    mutate_safetensors,
    mutate_text,
)
from transformers import CONFIG_MAPPING

from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.checkpoints.adapters import Adapter, MergedSource
from jaxgrad.checkpoints.convert import convert_model
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxgrad.checkpoints.key_table import CanonicalSource, check_weights
from jaxgrad.checkpoints.lora_plan import plan_merge
from jaxgrad.checkpoints.saved import DESCRIPTION
from jaxgrad.checkpoints.sources import INDEX_NAME, SafetensorsDirectory, read_model_config
from jaxgrad.checkpoints.tokenizer import tokenizer_from_directory
from jaxgrad.data import chat_template
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.read import DataSet, read_examples
from jaxgrad.errors import UserError
from jaxgrad.models.families import config_notes, ignored_attributes, read_config
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results import read_authors_jsonl
from jaxgrad.runs.plan import tokenize_examples
from jaxgrad.study import read_study

LONGEST_MESSAGE = 4000
TEMPLATE_SECONDS = 0.2  # the real limit is 20 s, too long for thousands of files

TINY = tiny_models.Tiny(2, 1, tied=False, width=8, mlp_width=6, head_size=4, num_layers=2)
EXAMPLES = (
    Example(0, "0", (Message("user", "Say 12 cafés."),), "so it is 中"),
    Example(1, "1", (Message("system", "Be brief."), Message("user", " a\n")), "b"),
)
OPTIONS = AnalyzeOptions(max_length=32)
RECORDS = [
    {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    {"instruction": "Say é.", "input": "twice", "output": "é é", "extra": [1, {"a": None}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "", "output": ""},
]


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader of untrusted files.

    Attributes:
        name: for the command line and for its directory.
        seeds: makes valid files.
        mutate: (random numbers, a seed, all seeds) -> a file that may be invalid.
        read: (file's bytes, this reader's own directory) -> nothing; raises `UserError` for a bad file,
            `AssertionError` for a wrong result.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    mutate: Callable[[random.Random, bytes, Sequence[bytes]], bytes]
    read: Callable[[bytes, Path], None]

    @functools.cached_property
    def folder(self) -> Path:
        """The directory of the reader's files in this process."""
        return Path(tempfile.mkdtemp(prefix=f"fuzz-{self.name}-"))

    @functools.cached_property
    def valid(self) -> Sequence[bytes]:
        """The seeds, each of which must be read."""
        return tuple(self.seeds())

    def mutated(self, rng: random.Random) -> bytes:
        """A file near one of the seeds."""
        return self.mutate(rng, rng.choice(self.valid), self.valid)

    def one_input(self, data: bytes) -> bool:
        """True if the file is read, False if it is properly refused."""
        try:
            with mock.patch.object(chat_template, "TEMPLATE_SECONDS", TEMPLATE_SECONDS):
                self.read(data, self.folder)
        except UserError as error:
            message = str(error)
            is_one_line = message and len(message) <= LONGEST_MESSAGE and message.isprintable()
            assert is_one_line, message[:500]
            return False
        return True


# Models


def _files() -> checkpoint_files.Files:
    return checkpoint_files.files_of(TINY)


def _model(folder: Path, **options: Any) -> Path:
    """The tiny model's directory, made once."""
    path = folder / "model"
    if not path.exists():
        checkpoint_files.write_model(path, tiny=TINY, **options)
    return path


def _tokenize(tokenizer: Any, config: Any) -> None:
    """Tokenize as an analysis does, by both protocols, and check the counts and ids."""
    model: Any = SimpleNamespace(tokenizer=tokenizer, config=config)
    for protocol in ("paper", "clean"):
        options = dataclasses.replace(OPTIONS, protocol=protocol)
        for item in tokenize_examples(model, EXAMPLES, options):
            assert item.num_prompt_tokens + item.num_response_tokens == item.num_tokens
            assert item.num_tokens <= OPTIONS.max_length
            assert all(0 <= token < config.vocab_size for token in item.token_ids)


@functools.cache
def _config() -> Any:
    return read_config(_files().config, "config.json")


def _wide_config() -> Any:
    """For tokenizers of any size."""
    return dataclasses.replace(_config()[1], vocab_size=1000)


def _safetensors_bytes(**options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_files.write_model(Path(folder) / "m", tiny=TINY, **options)
        return (path / "model.safetensors").read_bytes()


def _safetensors_seeds() -> list[bytes]:
    weights = _files().weights
    return [
        _safetensors_bytes(weights={n: v.astype(kind) for n, v in weights.items()})
        for kind in ("float32", "float16", "bfloat16")
    ]


def _check_directory(path: Path) -> None:
    """Reads all weights of a directory, and holds them against the bytes that the header names."""
    family, config = _config()
    source = CanonicalSource(SafetensorsDirectory(path), family, config)
    check_weights(config, family, source)
    found = {}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry, data[8 + size + begin : 8 + size + end])
    for name, shape in source.shapes().items():
        entry, content = found[name]
        assert list(shape) == entry["shape"]
        assert source.read(name).tobytes() == content
        blocks = np.concatenate([np.atleast_1d(block) for block in source.read_blocks(name)])
        assert blocks.tobytes() == content


def _read_safetensors(data: bytes, folder: Path) -> None:
    path = _model(folder, tokenizer=False)
    (path / "model.safetensors").write_bytes(data)
    _check_directory(path)


def _index_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_files.write_model(Path(folder) / "m", tiny=TINY, num_shards=3)
        return [(path / INDEX_NAME).read_bytes()]


def _read_index(data: bytes, folder: Path) -> None:
    path = _model(folder, tokenizer=False, num_shards=3)
    (path / INDEX_NAME).write_bytes(data)
    _check_directory(path)


ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj"],
    "use_rslora": True,
    "bias": "none",
    "modules_to_save": None,
    "base_model_name_or_path": "../m",
}


@functools.cache
def _adapter_weights() -> dict[str, np.ndarray]:
    values, found = np.random.default_rng(0), {}
    for name, weight in _files().weights.items():
        if name.endswith("q_proj.weight"):
            outputs, inputs = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            found[f"{stem}A.weight"] = values.standard_normal((2, inputs), np.float32)
            found[f"{stem}B.weight"] = values.standard_normal((outputs, 2), np.float32)
    return found


def _read_adapter(config: bytes, weights: bytes, folder: Path) -> None:
    """Merges all weights, and holds them against B A where the config has no patterns."""
    base, directory = _model(folder, tokenizer=False), folder / "a"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    adapter = Adapter(directory)
    family, decoder = _config()
    merge = plan_merge(adapter.config, adapter.tensors, family, decoder)
    whole = CanonicalSource(SafetensorsDirectory(base), family, decoder)
    source = MergedSource(whole, adapter, merge, family, decoder, decoder)
    check_weights(decoder, family, source)
    read, raw = safetensors.numpy.load(weights), json.loads(config)
    for name in merge.loras:
        addition = source.addition(name)
        assert addition is not None
        merged = addition.added_to(0, source.read(name))
        a, b = (
            read[f"base_model.model.{name.removesuffix('.weight')}.lora_{k}.weight"] for k in "AB"
        )
        if not (raw.get("alpha_pattern") or adapter.tensors.shapes().keys() - read.keys()):
            rank = len(a)
            scale = raw.get("lora_alpha", 8) / (rank**0.5 if raw.get("use_rslora") else rank)
            product = b.astype(np.float64) @ a.astype(np.float64)
            wanted = (whole.read(name).astype(np.float64) + scale * product).astype(merged.dtype)
            assert np.allclose(merged, wanted, rtol=1e-6, atol=1e-30)


def _read_adapter_config(data: bytes, folder: Path) -> None:
    _read_adapter(data, safetensors.numpy.save(_adapter_weights()), folder)


def _read_adapter_weights(data: bytes, folder: Path) -> None:
    _read_adapter(json.dumps(ADAPTER).encode(), data, folder)


def _config_seeds() -> list[bytes]:
    config = _files().config
    ropes = ({}, *({"rope_parameters": rope} for rope in tiny_models.ROPES.values()))
    return [json.dumps(config | rope).encode() for rope in ropes]


def _read_config(data: bytes, folder: Path) -> None:
    path = _model(folder)
    (path / "config.json").write_bytes(data)
    checkpoint = open_checkpoint(str(path))
    weights = _files().weights
    assert weights[checkpoint_files.EMBEDDING].shape == (
        checkpoint.config.vocab_size,
        checkpoint.config.width,
    )
    assert checkpoint.config.num_layers == TINY.num_layers
    _tokenize(checkpoint.tokenizer, checkpoint.config)


def _saved_config_seeds() -> list[bytes]:
    """Configs of all families, as the oldest and the newest versions of transformers write them."""
    folder = Path(__file__).parent.parent / "saved_configs"
    seeds = []
    for path in sorted(folder.glob("*.json")):
        entries = json.loads(path.read_text("utf-8")).values()
        whole = [entry["saved"] | entry["more"] for entry in entries if isinstance(entry, dict)]
        seeds += [json.dumps(raw | {"_model_name_or_path": "x"}).encode() for raw in whole]
    return seeds


def _read_saved_config(data: bytes, folder: Path) -> None:
    """What is ignored changes nothing, and transformers finds the same sizes and ropes."""
    (folder / "config.json").write_bytes(data)
    raw = read_model_config(folder)
    config = read_config(raw, "config.json")[1]
    ignored = ignored_attributes(raw, "config.json")
    assert all(line.isprintable() for line in config_notes(raw, "config.json"))
    assert config == read_config({k: raw[k] for k in raw.keys() - set(ignored)}, "c")[1]
    try:
        theirs = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw)).get_text_config()
    except Exception:  # it checks less and more than we do
        return
    assert config.vocab_size == theirs.vocab_size
    assert config.width == theirs.hidden_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.max_positions == theirs.max_position_embeddings
    for place, kind in zip(
        config.layer_kinds, getattr(theirs, "layer_types", None) or (), strict=False
    ):
        window = theirs.sliding_window if kind == "sliding_attention" else None
        assert config.kinds[place].window == window
    rope = getattr(theirs, "rope_parameters", None)
    for kind in config.kinds:
        if kind.rope is not None and rope and "full_attention" not in rope:
            assert kind.rope.theta == float(rope["rope_theta"])
            assert kind.rope.rotated_fraction == (rope.get("partial_rotary_factor") or 1.0)
            assert kind.rope.kind == {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])


def _gguf_seeds() -> list[bytes]:
    tokenizer = tiny_models.build_tokenizer()
    model = tiny_models.build_model(TINY, len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        whole = gguf_files.write_gguf(path, model, tokenizer).read_bytes()
        llama3 = gguf_files.write_gguf(path, model, tokenizer, pre="llama-bpe").read_bytes()
        return [whole, llama3]


def _read_gguf(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    checkpoint = open_checkpoint(str(path))
    source: Any = checkpoint.source
    for name, shape in source.shapes().items():
        values = source.read(name)
        assert values.shape == shape and values.dtype == source.dtype(name)
        blocks = np.concatenate([np.atleast_1d(block) for block in source.read_blocks(name)])
        assert blocks.tobytes() == values.tobytes()
    _tokenize(checkpoint.tokenizer, checkpoint.config)


def _build_tokenizer(kind: str, folder: Path) -> tuple[Any, gguf_tokenizers.Entries]:
    is_bytes = kind in gguf_tokenizers.BYTE_LEVEL
    build = gguf_tokenizers.byte_level if is_bytes else gguf_tokenizers.sentencepiece
    return build(kind, folder / kind)


def _gguf_tokenizer_seeds() -> list[bytes]:
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("smollm", "qwen2", "tekken", "llama", "gemma"):
            _, entries = _build_tokenizer(kind, Path(folder))
            architecture = "gemma" if kind == "gemma" else "llama"
            path = entries.write(Path(folder) / f"{kind}.gguf", architecture)
            seeds.append(path.read_bytes())
    return seeds


def _read_gguf_tokenizer(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer.gguf"
    path.write_bytes(data)
    tokenizer = tokenizer_from_gguf(GgufFile(path))
    _tokenize(tokenizer, _wide_config())


@functools.cache
def _converted() -> tuple[Path, bytes]:
    """A converted checkpoint, and its description as it was written."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-converted-"))
    source = checkpoint_files.write_model(folder / "source", tiny=TINY)
    convert_model(str(source), folder / "d", say=lambda line: None, progress=False)
    return folder / "d", (folder / "d" / DESCRIPTION).read_bytes()


def _read_description(data: bytes, folder: Path) -> None:
    path, _ = _converted()
    (path / DESCRIPTION).write_bytes(data)
    checkpoint = open_checkpoint(str(path))
    loaded = checkpoint.load("float32")
    shapes = checkpoint_files.parameters(loaded)
    assert shapes["embedding"].shape == _files().weights[checkpoint_files.EMBEDDING].shape


def _tokenizer_reader(file: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        path = _model(folder, weights={})
        (path / file).write_bytes(data)
        _tokenize(tokenizer_from_directory(path).tokenizer, _wide_config())

    return read


def _tokenizer_seeds() -> list[bytes]:
    texts = [_files().tokenizer["tokenizer.json"].decode()]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("llama-bpe", "llama"):
            _build_tokenizer(kind, Path(folder))
            texts.append((Path(folder) / kind / "tokenizer.json").read_text())
    return [text.encode() for text in texts]


def _read_sentencepiece(data: bytes, folder: Path) -> None:
    """A tokenizer.model of any content, as the directory's only vocabulary."""
    path = folder / "directory"
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(data)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    _tokenize(tokenizer_from_directory(path).tokenizer, _wide_config())


def _sentencepiece_seeds() -> list[bytes]:
    import sentencepiece_models  # here, because it needs a package of the tests

    kinds = sentencepiece_models.KINDS
    return [sentencepiece_models.train(**kinds[kind]) for kind in ("llama", "user_defined")]


def _special_tokens_seeds() -> list[bytes]:
    tokens = {"bos_token": {"content": tiny_models.BOS}, "additional_special_tokens": ["<|mark|>"]}
    return [json.dumps(tokens).encode()]


def _tokenizer_config_seeds() -> list[bytes]:
    own = json.loads(_files().tokenizer["tokenizer_config.json"])
    more = {
        "auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]},
        "added_tokens_decoder": {"0": {"content": tiny_models.BOS, "special": True}},
        "model_max_length": 1e30,
        "padding_side": "left",
        "chat_template": tiny_models.CHAT_TEMPLATE,
    }
    return [json.dumps(value).encode() for value in (own, own | more)]


TEMPLATE_SNIPPETS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ 'a' * 1000000000000 }}",
    "{{ 9**9**9 }}",
    "{{ [0] * 10000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a'|center(10000000000) }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ messages[0].content.format(messages) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '\\ud800' }}",
    "{{ strftime_now('%Q' * 1000) }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% set messages = 1 %}",
    "{% set ns = namespace(x=0) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{% if a %}" * 200,
    "{{ undefined_name.x.y }}",
    "{% break %}",
    "{{ range(3)|list|sum(start=[]) }}",
    "{{ dict(a=1).update({}) }}",
    "{{ messages.append(1) }}",
    "{{ lipsum(9999999) }}",
    "{{ 'x'|urlize }}",
)


def _template_seeds() -> list[bytes]:
    longer = (
        "{%- if messages[0]['role'] == 'system' -%}\n{%- set system = messages[0]['content'] -%}\n"
        "{%- set messages = messages[1:] -%}\n{%- endif -%}\n{{ bos_token }}\n"
        "{%- for m in messages %}\n{%- if loop.first %}{{ system }}{% endif %}\n"
        "{{ '<|mark|>' + m.role }}\n{{ m.content | trim }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n{{ strftime_now('%d %b %Y') }}\n{%- endif %}\n"
    )
    return [tiny_models.CHAT_TEMPLATE.encode(), longer.encode()]


# Data, results, studies


def _json_list_seeds() -> list[bytes]:
    return [json.dumps(RECORDS, indent=1).encode(), json.dumps(RECORDS[:1]).encode()]


def _json_lines_seeds() -> list[bytes]:
    return ["\n".join(map(json.dumps, RECORDS)).encode(), json.dumps(RECORDS[1]).encode() + b"\n"]


def _parquet_seeds() -> list[bytes]:
    plain = pa.table(
        {name: [r.get(name) for r in RECORDS[:2]] for name in ("instruction", "output")}
    )
    names = ("instruction", "input", "output", "messages")
    wide = pa.table({name: [r.get(name) for r in RECORDS] for name in names} | {"n": [1.5] * 4})
    many = pa.table({"instruction": ["a"] * 3000, "output": ["b", "cc", "ddd"] * 1000})
    seeds = []
    for table, options in (
        (plain, {"compression": "none", "use_dictionary": False}),
        (wide, {"compression": "snappy"}),
        (many, {"compression": "zstd", "row_group_size": 1000}),
        (many, {"compression": "gzip", "data_page_version": "2.0"}),
    ):
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        seeds.append(sink.getvalue())
    return seeds


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# Of each kind of records, a file.
KINDS_OF_RECORDS: tuple[list[dict[str, Any]], ...] = (
    [{"instruction": "a", "output": "b", "system": "s", "history": [["q", "a"]], "id": 1}],
    [
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps([CALL]),
        }
    ],
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ],
            "tools": [CALL],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ],
    [
        {"prompt": "p", "completion": " c"},
        {"prompt": "p", "completion": [RECORDS[2]["messages"][1]]},
    ],
    [{"text": "a"}, {"text": "é", "n": [None]}],
    [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [0, 1, 1]},
        {"input_ids": [4, 5], "assistant_masks": [0, 1], "position_ids": [0, 1]},
    ],
)
PREFERENCES = (
    [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": "q a", "rejected": "q b"}],
    [
        {
            "chosen": RECORDS[2]["messages"],
            "rejected": [RECORDS[2]["messages"][0], {"role": "assistant", "content": "c"}],
        }
    ],
)


def _record_seeds() -> list[bytes]:
    return [json.dumps(records).encode() for records in KINDS_OF_RECORDS]


def _preference_seeds() -> list[bytes]:
    return [json.dumps(records).encode() for records in PREFERENCES]


CSV_SNIPPETS = (
    "\n",
    "\r",
    '"',
    '"a\n',
    "a,b,c,d,e\n",
    "\0\n",
    "a;b\n",
    "\ufeff",
    "x" * 200_000 + "\n",
    '"' * 5000 + "\n",
    "," * 5000 + "\n",
    "'a','b'\n",
    "\u2028,\u2029\n",
    "\ud800,a\n",
    "[" * 100_000 + "\n",
    "{\n",
)


def _csv_seeds() -> list[bytes]:
    return [
        b'instruction,input,output\r\n"a, ""b""",c,d\r\n\r\ne,,"f\r\ng"\r\n',
        "\ufeffprompt;completion;id\né;ü;1\n".encode(),
        b'messages\tn\n"[{""role"": ""user"", ""content"": ""q""}, '
        b'{""role"": ""assistant"", ""content"": ""a""}]"\t1\n',
        b"text|n\n'a|1\n",
    ]


def _arrow_seeds() -> list[bytes]:
    plain = pa.table({"instruction": ["a", "bc"] * 3, "output": ["d", ""] * 3, "n": [1.5] * 6})
    repeated = pa.table({"text": pa.array(["ab", "c", "ab"]).dictionary_encode()})
    views = pa.table({"text": pa.array(["a" * 20, "b"], pa.string_view())})
    seeds = []
    for table, new, compression in (
        (plain, pa.ipc.new_stream, None),
        (plain, pa.ipc.new_file, "lz4"),
        (repeated, pa.ipc.new_file, None),
        (views, pa.ipc.new_stream, "zstd"),
        (pa.Table.from_pylist(KINDS_OF_RECORDS[2]), pa.ipc.new_stream, "zstd"),
        (pa.Table.from_pylist(KINDS_OF_RECORDS[5]), pa.ipc.new_stream, None),
    ):
        sink = io.BytesIO()
        with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as to:
            to.write_table(table, max_chunksize=4)
        seeds.append(sink.getvalue())
    return seeds


def _packed_seeds() -> list[bytes]:
    seeds = []
    for codec in ("gzip", "zstd"):
        for data in (json.dumps(RECORDS).encode(), _csv_seeds()[0], _parquet_seeds()[0]):
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, codec) as stream:
                stream.write(data)
            seeds.append(sink.getvalue().to_pybytes())
    return seeds


def _read_any(data: bytes, folder: Path) -> None:
    """Reads a file of any form. Nothing is compared: the readers share no second one."""
    path = folder / "data"
    path.write_bytes(data)
    _check_examples(read_examples(path))


def _read_csv(data: bytes, folder: Path) -> None:
    path = folder / "data.csv"
    path.write_bytes(data)
    _check_examples(read_examples(path))


def _read_preferences(data: bytes, folder: Path) -> None:
    path = folder / "data"
    path.write_bytes(data)
    chosen, rejected = (read_examples(path, response=name) for name in ("chosen", "rejected"))
    _check_examples(chosen)
    for one, other in zip(chosen.examples, rejected.examples, strict=True):
        assert one.messages == other.messages or one.id != other.id


def _read_state(data: bytes, folder: Path) -> None:
    """A directory that `datasets` saved, with this state.json."""
    path = folder / "set"
    if not path.exists():
        path.mkdir()
        for name, part in zip(("a.arrow", "b.arrow"), _arrow_seeds(), strict=False):
            (path / name).write_bytes(part)
    (path / "state.json").write_bytes(data)
    _check_examples(read_examples(path))


def _state_seeds() -> list[bytes]:
    state = {"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}], "_split": None}
    return [
        json.dumps(state | {"_format_columns": c}).encode()
        for c in (None, ["instruction", "output"])
    ]


def _check_examples(found: DataSet) -> None:
    assert found.num_records == len(found.examples) and len(found.sha256) == 64
    assert all(line.isprintable() for line in found.lines)
    for example in found.examples:
        assert len(example.id) == 16
        if example.given is not None:
            assert len(example.given.token_ids) == len(example.given.targets) > 0
        if example.reply is not None:
            assert (example.reply.role, example.reply.content) == ("assistant", example.response)
        for text in (example.response, *(m.content for m in example.messages)):
            text.encode()


def _read_examples(data: bytes, folder: Path) -> None:
    path = folder / "data"
    path.write_bytes(data)
    found = read_examples(path)
    if data.startswith(b"PAR1"):
        file = pq.ParquetFile(pa.BufferReader(data))
        wanted = [n for n in file.schema_arrow.names if n in RECORDS[0] or n == "messages"]
        records = file.read(columns=wanted).to_pylist()
    else:
        text = data.decode("utf-8-sig")
        is_list = text.lstrip(" \t\r\n").startswith("[")
        lines = [line for line in text.split("\n") if line.strip(" \t\r\n")]
        records = json.loads(text) if is_list else [json.loads(line) for line in lines]
    assert found.num_records == len(records) == len(found.examples)
    for example, record in zip(found.examples, records, strict=True):
        response = record.get("output")
        if record.get("messages") is not None and None in (response, record.get("instruction")):
            last = record["messages"][-1]
            response = last.get("content") or ""  # a list without parts, too
            if isinstance(response, list):
                response = "".join(part["text"] for part in response)
        assert example.response == response


def _authors_seeds() -> list[bytes]:
    def record(entry: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        names = [f"model.layers.{k}.self_attn.{p}_proj.weight" for k in (0, 1) for p in "qo"]
        return {"instruction": "a", "output": "b", "loss": 1.5} | {name: entry() for name in names}

    entries = {"M_mean": 0.1, "M_max": 0.5, "M_min": -0.5, "frobenius_norm": 0.9}
    with_lists = record(lambda: entries | {"S_list": [0.5, 0.25, 0.0]})
    cosines = {"layer_indices": [0, 1], "matrix": [[1.0, 0.5], [0.5, 1.0]]}
    with_lists["cosine_sim"] = {"q_proj": cosines}
    with_lists["cosine_sim_qkvo"] = {"0": {"q_proj_x_o_proj": 0.1}, "1": {"q_proj_x_o_proj": 0.2}}
    return ["\n".join([json.dumps(with_lists)] * 2).encode()]


def _read_authors(data: bytes, folder: Path) -> None:
    path = folder / "authors.jsonl"
    path.write_bytes(data)
    found = read_authors_jsonl(path)
    records = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    assert len(found.examples) == len(records)
    for loss, record in zip(found.examples["loss"], records, strict=True):
        # An integer beyond float64 is infinite, as 1e999 is.
        stored = record["loss"]
        is_beyond = isinstance(stored, int) and abs(stored) > 10**308
        expected = (math.inf if stored > 0 else -math.inf) if is_beyond else float(stored)
        assert loss == expected or (loss != loss and expected != expected)
    spectra = found.matrices.dropna(subset=["singular_values"])
    for sigma, total in zip(spectra["singular_values"], spectra["nuclear_norm"], strict=True):
        assert np.isclose(np.sum(sigma), total, equal_nan=True)


STUDY = """\
title = "T"
about = "what it is"
data_root = "${DATA}/x"
[analyze]
protocol = "clean"
max_length = 7
dtype = "float64"
date = "2024-02-29"
start = 2
limit = 5
[report]
level = 0.9
num_resamples = 300
seed = 4
[[models]]
name = "base"
role = "base"
pair = "p"
[[models]]
name = "tuned"
path = "./tuned"
role = "instruct"
pair = "p"
[[data]]
name = "AQuA"
kind = "reasoning"
correct = {none = "none.json", detailed = "detailed.json"}
irrelevant = {none = "other.json"}
"""
STUDY_SNIPPETS = (
    "limit = 1e400\n",
    "start = -1\n",
    "seed = 99999999999999999999999\n",
    "level = nan\n",
    "level = inf\n",
    "max_length = 0x7fffffffffffffff\n",
    "[[models]]\n",
    "[[data]]\n",
    "[analyze]\n",
    'name = "../../up"\n',
    'name = "a/b"\n',
    'path = "${HOME}"\n',
    "x = " + "[" * 5000 + "\n",
    "a." * 3000 + "b = 1\n",
    "title = 1979-05-27T07:32:00Z\n",
    'correct = "none.json"\n',
    'title = "\\ud800"\n',
    'title = """\n',
    "date = 2024-02-29\n",
    "num_resamples = 1" + "0" * 5000 + "\n",
)


def _read_study(data: bytes, folder: Path) -> None:
    path = folder / "study.toml"
    path.write_bytes(data)
    study = read_study(path)
    tree = tomllib.loads(data.decode())
    assert study.title == tree["title"] and len(study.models) == len(tree["models"])
    for model in study.models:
        for role in study.roles(model):
            # Below the study's directory, whatever the names are.
            assert (folder / role.stem).resolve().parent == folder.resolve()


READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", _safetensors_seeds, mutate_safetensors, _read_safetensors),
        Reader("safetensors_index", _index_seeds, mutate_json_file, _read_index),
        Reader("config", _config_seeds, mutate_json_file, _read_config),
        Reader("saved_config", _saved_config_seeds, mutate_json_file, _read_saved_config),
        Reader(
            "adapter_config",
            lambda: [json.dumps(ADAPTER).encode()],
            mutate_json_file,
            _read_adapter_config,
        ),
        Reader(
            "adapter_weights",
            lambda: [safetensors.numpy.save(_adapter_weights())],
            mutate_safetensors,
            _read_adapter_weights,
        ),
        Reader("gguf", _gguf_seeds, mutate_bytes, _read_gguf),
        Reader("gguf_tokenizer", _gguf_tokenizer_seeds, mutate_bytes, _read_gguf_tokenizer),
        Reader("description", lambda: [_converted()[1]], mutate_json_file, _read_description),
        Reader(
            "tokenizer", _tokenizer_seeds, mutate_json_file, _tokenizer_reader("tokenizer.json")
        ),
        Reader(
            "tokenizer_config",
            _tokenizer_config_seeds,
            mutate_json_file,
            _tokenizer_reader("tokenizer_config.json"),
        ),
        Reader(
            "special_tokens_map",
            _special_tokens_seeds,
            mutate_json_file,
            _tokenizer_reader("special_tokens_map.json"),
        ),
        Reader("sentencepiece", _sentencepiece_seeds, mutate_bytes, _read_sentencepiece),
        Reader(
            "chat_template",
            _template_seeds,
            mutate_text(TEMPLATE_SNIPPETS),
            _tokenizer_reader("chat_template.jinja"),
        ),
        Reader("json_list", _json_list_seeds, mutate_json_file, _read_examples),
        Reader("json_lines", _json_lines_seeds, mutate_json_lines, _read_examples),
        Reader("parquet", _parquet_seeds, mutate_bytes, _read_examples),
        Reader("records", _record_seeds, mutate_json_file, _read_any),
        Reader("preferences", _preference_seeds, mutate_json_file, _read_preferences),
        Reader("csv", _csv_seeds, mutate_text(CSV_SNIPPETS), _read_csv),
        Reader("arrow", _arrow_seeds, mutate_bytes, _read_any),
        Reader("packed", _packed_seeds, mutate_bytes, _read_any),
        Reader("saved_set", _state_seeds, mutate_json_file, _read_state),
        Reader("authors", _authors_seeds, mutate_json_lines, _read_authors),
        Reader("study", lambda: [STUDY.encode()], mutate_text(STUDY_SNIPPETS), _read_study),
    )
}
