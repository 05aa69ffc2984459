"""Bad input ends in one line that says what is wrong, where, and how to mend it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import files_of, write_json, write_model

import jaxgrad
from jaxgrad.errors import UserError

ANALYZE = Path(__file__).parent.parent / "bin" / "analyze"
RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("so", "that")]
OPTIONS = jaxgrad.AnalyzeOptions(max_length=32, chat="no", parameters=r"layers\.1\..*k_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_json(tmp_path / "data.json", RECORDS)


# The command analyze, as a user sees it


def refused_by_binary(*arguments: str | Path, cwd: Path) -> str:
    """The one line that bin/analyze ends with. Checks the exit code, and that nothing else is printed."""
    done = subprocess.run(
        [sys.executable, str(ANALYZE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in cwd.iterdir()) == sorted(
        {"data.json"} & set(os.listdir(cwd))
    )
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--data_path is missing: files of records, or hf:ORG/NAME:SPLIT"),
        (["--data_path=data.json"], "--output_dir is missing: the directory for the results"),
        (["--data_path=data.json", "--nope=1"], "Unknown command line flag 'nope'"),
        (["--data_path=data.json", "--limit=abc"], "--limit=abc: invalid literal"),
        (
            ["--data_path=data.json", "--dtype=int8"],
            "--dtype=int8: value should be one of <float32",
        ),
        (["--data_path=data.json", "extra"], "argument 'extra' is not a flag"),
        (
            ["--data_path=data.json", "--output_format=jsonl", "--loss=response_sum"],
            "--output_format=jsonl holds gradients of --loss=response_mean",
        ),
    ],
)
def test_flags(data, arguments, told):
    message = refused_by_binary(*arguments, cwd=data.parent)
    assert told in message
    if len(arguments) == 2:  # what is wrong is the flag itself
        assert "--help" in message


def test_parameters_that_match_nothing(data, model):
    message = refused_by_binary(
        "--data_path=data.json",
        "--output_dir=out",
        f"--model_path={model}",
        "--max_length=32",
        "--parameters=qkv_proj",
        cwd=data.parent,
    )
    assert "--parameters 'qkv_proj' matches none of the 22 weights" in message
    assert "model.layers.0.self_attn.q_proj.weight" in message


# The library call


def refusal(data_path: Path, model_path: Path | str, output_dir: Path, **changes: Any) -> str:
    """The message of `run_analysis`; nothing may be said, or written, before it."""
    keys = {field.name for field in dataclasses.fields(OPTIONS)}
    options = dataclasses.replace(OPTIONS, **{k: v for k, v in changes.items() if k in keys})
    existed, said = output_dir.exists(), []
    with pytest.raises(UserError) as caught:
        jaxgrad.run_analysis(
            model_path=str(model_path),
            data_paths=[data_path],
            output_dir=output_dir,
            options=options,
            say=said.append,
            progress=False,
            **{k: v for k, v in changes.items() if k not in keys},
        )
    assert not said
    assert output_dir.exists() == existed
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_data_file_that_is_missing(tmp_path, model):
    message = refusal(tmp_path / "none.json", model, tmp_path / "out")
    assert "none.json: no such file" in message


def test_a_record_without_output(tmp_path, model):
    records = [*RECORDS, {"instruction": "Say it.", "answer": "it"}]
    data = write_json(tmp_path / "data.json", records)
    message = refusal(data, model, tmp_path / "out")
    assert "data.json: record 2 has no field 'output'" in message
    assert "'answer'" in message and "--output_field" in message


def test_a_data_file_that_is_cut(tmp_path, model):
    whole = json.dumps(RECORDS).encode()
    (tmp_path / "data.json").write_bytes(whole[:-5])
    message = refusal(tmp_path / "data.json", model, tmp_path / "out")
    assert "data.json: broken JSON: " in message
    # The string that was cut in two begins after the last `": `.
    assert f"at byte offset {whole.rindex(b': ') + 2} of {len(whole) - 5}" in message


def test_an_output_directory_below_a_file(data, model):
    message = refusal(data, model, data / "sub" / "out")
    assert "data.json/sub/out: a file is in the way" in message


@pytest.fixture(scope="module")
def broken_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    pickles = write_model(folder / "pickles", weights={})
    (pickles / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    write_model(folder / "mamba", config={"model_type": "mamba", "architectures": ["Mamba"]})
    return folder


def test_a_model_of_pickles(tmp_path, data, broken_models):
    message = refusal(data, broken_models / "pickles", tmp_path / "out")
    assert "pickled weights only (pytorch_model.bin): refused" in message
    assert "convert the model to safetensors first" in message


def test_a_model_of_an_unsupported_family(tmp_path, data, broken_models):
    message = refusal(data, broken_models / "mamba", tmp_path / "out")
    assert "model type 'mamba'" in message and "llama (LlamaForCausalLM)" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty; give a JSON list"),
        (b" \n\n", "the file is empty"),
        (b"[]", "the file holds no records"),
        (b"{}", "record 0 has no field 'instruction' (its fields: none)"),
        (b"3", "the top level is a number, not a list of records"),
        (b'{"instruction": "a",\n "output": "b"}', "the top level is an object, not a list"),
        (b"[3]", "record 0 is a number, not an object"),
        (b'[{"instruction": "a", "output": 7}]', "record 0: field 'output' is a number"),
        (b'[{"instruction": "a", "output": null}]', "record 0: field 'output' is null"),
        (b'[{"instruction": ["a"], "output": "b"}]', "record 0: field 'instruction' is a list"),
        (
            b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 7}\n',
            "record 1: field 'output' is a number",
        ),
        (
            b'{"instruction": "a", "output": "b"}\n{"instr',
            "Unterminated string starting at byte offset 37 of 43 in line 2",
        ),
        (b"PAR1" + bytes(50), "broken Parquet of 54 bytes"),
        (b"\x1f\x8b\x08" + bytes(50), "broken gzip of 53 bytes"),
        (b'[{"messages": []}]', "field 'messages' is empty"),
    ],
)
def test_data_files(tmp_path, model, content, told):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    message = refusal(path, model, tmp_path / "out")
    assert message.startswith(f"{path}: ") and told in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": -1}, "--start=-1 is negative"),
        ({"start": 2}, "--start=2 is beyond the end; the file has 2 records"),
        ({"limit": 0}, "--limit=0 leaves no record"),
        ({"limit": -3}, "--limit=-3 leaves no record"),
        ({"max_length": 1}, "--max_length=1 leaves no token to predict; give >= 2"),
        ({"max_length": 0}, "--max_length=0 leaves no token"),
        ({"max_length": -5}, "--max_length=-5 leaves no token"),
        ({"max_length": 258}, "--max_length 258 exceeds the model's 257 positions; give"),
        ({"max_length": 1024}, "give --max_length=257 or less"),
        ({"parameters": "qkv_proj"}, "--parameters 'qkv_proj' matches none of the 22 weights"),
        ({"parameters": "("}, "--parameters '(' is not a regular expression"),
        ({"parameters": "norm"}, "--parameters 'norm' matches none"),
        ({"loss": "mean"}, "--loss=mean is unknown; there are response_mean, response_sum"),
    ],
)
def test_options(tmp_path, data, model, changes, told):
    assert told in refusal(data, model, tmp_path / "out", **changes)


def test_a_chat_that_the_model_does_not_have(tmp_path, data):
    model = write_model(tmp_path / "plain")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    told = "--chat=yes, but the tokenizer has no chat template; use --chat=no"
    assert told in refusal(data, model, tmp_path / "out", chat="yes")


def test_a_chat_template_that_is_broken(tmp_path, data):
    model = write_model(tmp_path / "m")
    (model / "chat_template.jinja").write_text("{% for %}")
    message = refusal(data, model, tmp_path / "out", chat="yes")
    assert f"record 0: the chat template of {model} fails" in message and "--chat=no" in message


def test_a_chat_template_without_end_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr(jaxgrad.data.chat_template, "TEMPLATE_SECONDS", 1.0)
    model = write_model(tmp_path / "m")
    loop = "{% for i in range(99999) %}"
    (model / "chat_template.jinja").write_text(loop * 3 + "{% endfor %}" * 3)
    message = refusal(data, model, tmp_path / "out", chat="yes")
    assert f"record 0: the chat template of {model} fails" in message
    assert "takes more than 1 s" in message


def test_a_file_s_text_cannot_steer_the_terminal(tmp_path, model):
    """Escapes, carriage returns, reversed text and half characters are shown as escapes."""
    name = "\x1b[2J\r\u202e\ud800\u2028é"
    data = write_json(tmp_path / "data.json", [{name: "a"}])
    message = refusal(data, model, tmp_path / "out")
    assert r"\x1b[2J\r\u202e\ud800\u2028" in message.replace("\\\\", "\\") and "é" in message
    assert message.isprintable()


def test_a_message_of_any_length_is_cut_in_its_middle(tmp_path, model):
    data = write_json(tmp_path / "data.json", [{"k" * 10**6: "a"}])
    message = refusal(data, model, tmp_path / "out")
    assert len(message) < 4000 and message.startswith(f"{data}: record 0 has no field")
    assert " [...] " in message and message.endswith("{input_ids, labels}, {text}")
    assert "name the one that holds it with --instruction_field" in message


def test_a_tokenizer_whose_library_gives_up_is_refused(tmp_path, data, monkeypatch):
    """A panic in Rust is no `Exception`. It cannot be caused on demand, so this test raises one."""

    class PanicException(BaseException):
        pass

    class Tokenizer:
        @staticmethod
        def from_file(path):
            raise PanicException("index out of bounds")

    monkeypatch.setattr("jaxgrad.checkpoints.tokenizer.Tokenizer", Tokenizer)
    message = refusal(data, write_model(tmp_path / "m"), tmp_path / "out")
    assert "the tokenizer cannot be read (PanicException: index out of bounds)" in message


@pytest.mark.parametrize("value", ["x", [1]])
def test_a_tokenizer_config_that_breaks_the_encoding_is_named(tmp_path, data, value):
    model = write_model(tmp_path / "m")
    path = model / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"model_max_length": value})
    message = refusal(data, model, tmp_path / "out")
    assert "record 0: the tokenizer fails (TypeError" in message


def test_a_tokenizer_of_another_model(tmp_path, data):
    # The embedding lacks the last tokens' rows. JAX would take its last row for them.
    rows = 100
    weights = {
        name: values[:rows] if values.shape[0] == files_of().config["vocab_size"] else values
        for name, values in files_of().weights.items()
    }
    model = write_model(tmp_path / "m", config={"vocab_size": rows}, weights=weights)
    message = refusal(data, model, tmp_path / "out")
    assert "record 0 has token " in message and "has only 100 tokens" in message
    assert "the tokenizer is not this model's" in message


def test_a_model_that_is_nowhere(tmp_path, data):
    message = refusal(data, tmp_path / "none", tmp_path / "out")
    assert f"--model_path {tmp_path / 'none'}: no such file or directory" in message


def test_a_model_that_is_broken(tmp_path, data):
    model = write_model(tmp_path / "m")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a complete safetensors file" in refusal(data, model, tmp_path / "out")


def test_data_is_checked_before_the_model(tmp_path):
    data = write_json(tmp_path / "data.json", [{"instruction": "a"}])
    assert "record 0 has no field 'output'" in refusal(data, tmp_path / "none", tmp_path / "out")


def test_an_output_directory_that_is_a_file(tmp_path, data, model):
    message = refusal(data, model, data)
    assert str(data) in message and "a file is in the way" in message


def test_an_output_directory_with_other_files(tmp_path, data, model):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    message = refusal(data, model, out)
    assert "is not empty and holds no run" in message and "thesis.txt" in message
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


# A directory that holds another run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("finished")
    data = write_json(folder / "data.json", RECORDS)
    [summary] = jaxgrad.run_analysis(
        model_path=str(model),
        data_paths=[data],
        output_dir=folder / "out",
        options=OPTIONS,
        say=lambda line: None,
        progress=False,
    )
    assert summary.counts["ok"] == 2
    return data, folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_length": 31}, "options.max_length is 32 there, 31 here"),
        ({"max_length": None}, "options.max_length is 32 there, 257 here"),
        ({"protocol": "clean"}, 'options.protocol is "paper" there, "clean" here'),
        ({"parameters": "mlp"}, 'options.parameters is "layers'),
        ({"method": "dense"}, 'options.method is "auto" there, "dense" here'),
        ({"dtype": "bfloat16"}, 'options.dtype is "float32" there, "bfloat16" here'),
        ({"limit": 1}, "data.limit is"),
        ({"start": 1}, "data.start is 0 there, 1 here"),
    ],
)
def test_a_run_of_other_settings_is_named_and_kept(finished, model, changes, told):
    data, out = finished
    before = contents(out)
    message = refusal(data, model, out, **changes)
    assert f"{out} holds a run with other settings: " in message
    assert told in message and "Give another --output_dir" in message
    assert contents(out) == before


def test_a_run_of_other_data_is_named(finished, model, tmp_path):
    _, out = finished
    data = write_json(tmp_path / "data.json", [*RECORDS, *RECORDS])
    assert "data.sha256 is " in refusal(data, model, out)


def test_a_run_of_another_model_is_named(finished, tmp_path):
    data, out = finished
    weights = {name: values * 2 for name, values in files_of().weights.items()}
    model = write_model(tmp_path / "other", weights=weights)
    before = contents(out)
    with pytest.raises(UserError, match=r"model\.weights_sha256 is ") as caught:
        jaxgrad.run_analysis(
            model_path=str(model),
            data_paths=[data],
            output_dir=out,
            options=OPTIONS,
            say=lambda line: None,
            progress=False,
        )
    assert "Give another --output_dir" in str(caught.value)
    assert contents(out) == before


def test_a_damaged_run_is_named(finished, model, tmp_path):
    data, _ = finished
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"format": ')
    message = refusal(data, model, out)
    assert "run.json" in message
