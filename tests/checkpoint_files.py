"""One tiny model of `tiny_models` as files of every format, with changes, and how to read them."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import jaxgrad
from jaxgrad.checkpoints import LoadedModel, open_checkpoint
from jaxgrad.errors import UserError
from jaxgrad.models.decoder import named_parameters

UNTIED = tiny_models.Tiny(4, 2, tied=False)
TIED = tiny_models.Tiny(4, 2, tied=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A weight of the middle layer, to damage: not square, and not the only one of its shape.
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@dataclasses.dataclass(frozen=True)
class Files:
    """What transformers saves of a model: config.json, weights, and the tokenizer's files."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokenizer: dict[str, bytes]


@functools.cache
def files_of(tiny: tiny_models.Tiny = UNTIED) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny_models.save_tiny(tiny, Path(folder))
        config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        tokenizer = {path.name: path.read_bytes() for path in directory.glob("tokenizer*")}
        tokenizer |= {path.name: path.read_bytes() for path in directory.glob("*.jinja")}
    return Files(config, weights, tokenizer)


def weights_with(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The untied model's weights with changes; None removes one. Give names as a `**dict`."""
    weights = files_of().weights | changes
    return {name: values for name, values in weights.items() if values is not None}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_model(
    directory: Path,
    *,
    tiny: tiny_models.Tiny = UNTIED,
    config: dict[str, Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    num_shards: int = 0,
    tokenizer: bool = True,
) -> Path:
    """The model as a Hugging Face directory.

    Args:
        directory: will be made.
        config: attributes that differ.
        weights: in place of the model's own; {} for none.
        num_shards: split the weights over so many files with an index.
        tokenizer: whether it gets one.
    """
    directory.mkdir(parents=True)
    files = files_of(tiny)
    write_json(directory / "config.json", files.config | (config or {}))
    weights = files.weights if weights is None else weights
    if num_shards:
        weight_map = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
            part = dict(list(weights.items())[shard::num_shards])
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    elif weights:
        save_file(weights, directory / "model.safetensors")
    if tokenizer:
        for name, content in files.tokenizer.items():
            (directory / name).write_bytes(content)
    return directory


@functools.cache
def gguf_bytes(tiny: tiny_models.Tiny = UNTIED) -> bytes:
    """The same model as GGUF, as llama.cpp's converter writes it."""
    tokenizer = tiny_models.build_tokenizer()
    model = tiny_models.build_model(tiny, len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        return gguf_files.write_gguf(path, model, tokenizer).read_bytes()


def write_gguf(
    path: Path,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """The model as a GGUF file with other metadata entries or tensors; None removes one."""
    path.write_bytes(gguf_bytes())
    if metadata is None and tensors is None:
        return path
    reader = gguf.GGUFReader(path)
    entries = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    types = {name: field.types for name, field in reader.fields.items()}
    values = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    entries |= metadata or {}
    values |= tensors or {}
    architecture = entries.pop("general.architecture")
    writer = gguf.GGUFWriter(path.with_suffix(".new"), architecture)
    for name, value in entries.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            # A number keeps the type of the original.
            same = name in types and not isinstance(value, str | list)
            writer.add_key_value(name, value, types[name][0] if same else kind)
    for name, array in values.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".new").replace(path)


def write_hub_cache(cache: Path, repository: str, **options: Any) -> Path:
    """The model in a cache as huggingface_hub writes it, but without blobs; the cache's path."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / f"models--{repository.replace('/', '--')}"
    write_model(folder / "snapshots" / commit, **options)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return cache


def refusal(path: Path | str) -> str:
    """The error message when the model is opened. Its weights are not read."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def shape_of(name: str) -> list[int]:
    return list(files_of().weights[name].shape)


def load(path: Path, dtype: str = "float32") -> LoadedModel:
    return jaxgrad.load_model(str(path), dtype=dtype)


def parameters(model: LoadedModel) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in named_parameters(model.state).items()}


def assert_same_parameters(one: LoadedModel, other: LoadedModel) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), name
