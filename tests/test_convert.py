"""bin/convert: the source's results bit by bit; half-written and damaged checkpoints are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_files
import family_models
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    K_PROJ,
    UNTIED,
    assert_same_parameters,
    files_of,
    load,
    parameters,
    write_json,
    write_model,
)
from flax import nnx

import jaxgrad
from jaxgrad.checkpoints import convert, fill, saved
from jaxgrad.checkpoints.convert import convert_model
from jaxgrad.checkpoints.saved import DESCRIPTION
from jaxgrad.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# A fused and transposed weight, one fused head by head, a decoder inside a larger model.
FAMILIES = ["gpt2", "gpt_neox_parallel", "gemma3_multimodal"]


def convert_to(source, target):
    lines = []
    convert_model(str(source), target, say=lines.append, progress=False)
    return lines


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        convert_to(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_refusal(directory):
    with pytest.raises(UserError) as caught:
        jaxgrad.load_model(str(directory))
    message = str(caught.value)
    assert "\n" not in message and "convert the model again" in message
    return message


def assert_same_model(one, other, dtype):
    ours, theirs = load(one, dtype), load(other, dtype)
    assert_same_parameters(ours, theirs)
    assert {values.dtype.name for values in parameters(ours).values()} == {dtype}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "m", num_shards=2)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "d"
    convert_to(source, directory)
    return directory


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


# What comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_dtype_comes_back_bit_by_bit(tmp_path, stored, dtype):
    weights = {name: values.astype(stored) for name, values in files_of().weights.items()}
    model = write_model(tmp_path / "m", weights=weights)
    convert_to(model, tmp_path / "d")
    assert_same_model(model, tmp_path / "d", dtype)
    described = json.loads((tmp_path / "d" / DESCRIPTION).read_text())
    kinds = {entry["dtype"] for entry in described["parameters"].values()}
    assert kinds == {np.dtype(stored).name}


def test_layers_of_different_dtypes_are_kept_in_one_that_holds_them_all(tmp_path):
    weights = dict(files_of().weights)
    for name, kind in ((K_PROJ, np.float16), (K_PROJ.replace(".1.", ".2."), ml_dtypes.bfloat16)):
        weights[name] = weights[name].astype(kind)
    for layer, kind in enumerate((np.float16, ml_dtypes.bfloat16, np.float16)):
        name = K_PROJ.replace(".1.", f".{layer}.").replace("k_proj", "v_proj")
        weights[name] = weights[name].astype(kind)
    model = write_model(tmp_path / "m", weights=weights)
    convert_to(model, tmp_path / "d")
    assert_same_model(model, tmp_path / "d", "float32")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layout_comes_back_bit_by_bit(tmp_path, name):
    model = family_models.save_model(family_models.MODELS[name], tmp_path / "m")
    convert_to(model, tmp_path / "d")
    assert_same_model(model, tmp_path / "d", "float32")


def test_a_gguf_file_comes_back_with_its_tokenizer(tmp_path):
    file = checkpoint_files.write_gguf(tmp_path / "m.gguf")
    convert_to(file, tmp_path / "d")
    assert_same_model(file, tmp_path / "d", "float32")
    ours, theirs = (jaxgrad.load_model(str(p)).tokenizer for p in (tmp_path / "d", file))
    text = "<s> naïve  cafés\n\t12345 🚂</s><defined>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_an_analysis_gives_the_source_s_bytes_and_may_be_continued_from_either(
    source, whole, tmp_path
):
    data = tmp_path / "data.json"
    records = [{"instruction": f"how long is {i}", "output": "an hour"} for i in range(3)]
    data.write_text(json.dumps(records))
    outputs = {}
    for name, model in (("source", source), ("converted", whole)):
        command = [sys.executable, str(ROOT / "bin" / "analyze"), f"--model_path={model}"]
        flags = [
            f"--data_path={data}",
            f"--output_dir={tmp_path / name}",
            "--parameters=1.*[qo]_proj",
        ]
        subprocess.run([*command, *flags, "--max_length=64"], check=True, capture_output=True)
        folder = tmp_path / name
        outputs[name] = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")
        }
        outputs[name]["identity"] = json.loads((folder / "run.json").read_text())["identity"]
    assert len(outputs["source"]) == 3
    assert outputs["source"] == outputs["converted"]


def test_it_says_what_it_came_from(source, whole):
    described = json.loads((whole / DESCRIPTION).read_text())
    assert described["source"]["model"] == str(source)
    assert described["source"]["weights_sha256"] == jaxgrad.load_model(str(source)).fingerprint
    assert {"config.json", "tokenizer.json"} < described["source"]["files"].keys()
    assert {"command", "versions", "commit"} == described["provenance"].keys()
    assert described["config"] == files_of(UNTIED).config


# Nothing half done


def test_a_second_conversion_does_nothing(source, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    lines = convert_to(source, whole)
    assert lines == [f"{whole} holds this conversion already: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_another_model_s_conversion_is_not_overwritten(whole, tmp_path):
    other = write_model(tmp_path / "other")
    assert "holds the conversion of other files" in refusal(other, whole)


def test_a_directory_with_anything_in_it_is_refused(source, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("mine")
    assert "exists and is not a converted checkpoint" in refusal(source, tmp_path / "d")
    assert "exists and is not" in refusal(source, tmp_path / "d" / "notes.txt")
    assert (tmp_path / "d" / "notes.txt").read_text() == "mine"


def test_an_empty_directory_will_do(source, tmp_path):
    (tmp_path / "d").mkdir()
    convert_to(source, tmp_path / "d")
    assert_same_model(source, tmp_path / "d", "float32")


def test_a_converted_checkpoint_is_not_converted_again(whole, tmp_path):
    assert "is a converted checkpoint already; copy it" in refusal(whole, tmp_path / "d")


def test_what_an_interrupted_conversion_left_is_replaced(source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_description", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_to(source, tmp_path / "d")
    assert not (tmp_path / "d").exists() and (tmp_path / "d.partial" / "weights").is_dir()
    convert_to(source, tmp_path / "d")
    assert not (tmp_path / "d.partial").exists()
    assert_same_model(source, tmp_path / "d", "float32")


def test_a_full_disk_is_told_before_anything_is_read(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(fill, "read_weights", None)
    assert "has 0.00 GB free, the checkpoint needs 0.07 GB" in refusal(source, tmp_path / "d")


def test_a_place_that_cannot_be_written_is_told(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(source, tmp_path / "file" / "d")


def test_values_that_do_not_come_back_are_named(source, tmp_path, monkeypatch):
    """The comparison with the source finds a flipped bit."""
    restore = saved.SavedDecoder.restore

    def turned(self, config, dtype):
        graphdef, state = restore(self, config, dtype)
        flat = nnx.to_flat_state(state)
        path, leaf = next((p, x) for p, x in flat if p[-2:] == ("k", "weight"))
        array = np.array(leaf.get_value())
        array[1, 3, 5] = np.nextafter(array[1, 3, 5], np.inf)
        changed = [(p, leaf.replace(array) if p == path else x) for p, x in flat]
        return graphdef, nnx.from_flat_state(changed)

    monkeypatch.setattr(saved.SavedDecoder, "restore", turned)
    message = refusal(source, tmp_path / "d")
    assert "model.layers.1.self_attn.k_proj.weight did not come back as it was written" in message
    assert not (tmp_path / "d").exists()


# Damage


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_missing_part_is_named(damaged, part):
    shutil.rmtree(damaged / part)
    assert f"{part}/ is missing" in load_refusal(damaged)


def data_files(directory):
    return [path for path in (directory / "weights").rglob("*") if path.parent.name == "d"]


def test_a_missing_file_is_named(damaged):
    path = data_files(damaged)[0]
    path.unlink()
    assert f"{path.name} is missing" in load_refusal(damaged)


def test_a_file_that_is_cut_is_named(damaged):
    path = data_files(damaged)[0]
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert f"{path.name} has {len(content) - 3} bytes, not {len(content)}" in load_refusal(damaged)


def test_weights_with_other_bytes_are_told_in_one_line(damaged):
    """In its own process, because TensorStore later reports to an event loop that is closed."""
    for path in data_files(damaged):
        path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes()))
    code = f"import sys, jaxgrad\ntry: jaxgrad.load_model({str(damaged)!r})\n"
    code += "except jaxgrad.UserError as error: sys.exit(str(error))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Orbax cannot restore its weights" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "is of format 2, this jaxgrad reads 1"),
        ({"format": None}, "is of format None"),
        ({"config": None}, "has no config"),
        ({"parameters": []}, "has no parameters"),
        ({"source": "x"}, "has no source"),
        ({"parameters": {}}, "its parameters are not those of its config"),
        (
            {"parameters": {"embedding": {"shape": [2]}}},
            "its parameters are not described: 'dtype'",
        ),
        ({"parameters": {"embedding": 3}}, "its parameters are not described"),
    ],
)
def test_a_description_that_does_not_fit_is_told(damaged, change, told):
    description = json.loads((damaged / DESCRIPTION).read_text())
    write_json(damaged / DESCRIPTION, description | change)
    assert told in load_refusal(damaged)


def test_a_description_that_is_no_json_is_told(damaged):
    (damaged / DESCRIPTION).write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        jaxgrad.load_model(str(damaged))


def test_a_config_that_is_not_understood_is_told(damaged):
    description = json.loads((damaged / DESCRIPTION).read_text())
    description["config"]["hidden_act"] = "magic"
    write_json(damaged / DESCRIPTION, description)
    with pytest.raises(UserError, match="hidden_act"):
        jaxgrad.load_model(str(damaged))


# The binary


def test_the_binary_tells_what_is_wrong_and_exits_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "bin" / "convert")]
    for flags, told in (
        ([f"--model_path={tmp_path}"], "--output_dir is missing"),
        ([f"--model_path={tmp_path}", f"--output_dir={tmp_path / 'd'}"], "has no config.json"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and told in done.stderr
        assert done.stderr.count("\n") == 1
