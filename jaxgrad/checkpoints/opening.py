"""Opens a model's files: config, names and shapes of the weights, tokenizer. No weight is read.

The cheapest checks come first: config, names of the weights, tokenizer.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgrad.checkpoints.adapters import Adapter, MergedSource, merged_config
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.gguf_tokenizer import gguf_rule, tokenizer_from_gguf
from jaxgrad.checkpoints.key_table import CanonicalSource, check_weights
from jaxgrad.checkpoints.lora_plan import plan_merge
from jaxgrad.checkpoints.places import ModelLocation, resolve_model
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.checkpoints.sources import (
    ADAPTER_CONFIG,
    SafetensorsDirectory,
    WeightSource,
    read_model_config,
    whole_weight_files,
)
from jaxgrad.checkpoints.tokenizer import LoadedTokenizer, tokenizer_from_directory
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family, config_notes, read_config
from jaxgrad.options import ModelOptions

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What changes a tokenizer without being one.
TOKENIZER_SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "added_tokens.json")

FileStats = dict[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model's files, opened.

    Attributes:
        raw: its config.json; for a GGUF file, made from the metadata.
        source: its weights.
        tokenizer: reads its tokenizer.
        tokenizer_place: the directory or the GGUF file of the tokenizer.
        files: file name -> (bytes, modification time in ns). Those of an adapter's base are "base/NAME".
        notes: lines for the user: what of the names was stripped, what was merged.
        origin: what run.json keeps of where the weights are from.
    """

    raw: dict[str, Any]
    family: Family
    config: DecoderConfig
    source: WeightSource | SavedDecoder
    tokenizer: Callable[[], LoadedTokenizer]
    tokenizer_place: Path
    files: FileStats
    notes: tuple[str, ...] = ()
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_model(location: ModelLocation, options: ModelOptions) -> OpenModel:
    """Open a model; an adapter together with its base.

    Raises:
        UserError: what is wrong with the model or the options, in one line.
    """
    if uses_adapter(location, options):
        return _open_adapter(location, options)
    model = _open_whole(location)
    if location.commit is None:
        return model
    return dataclasses.replace(model, origin=model.origin | {"hub": location.described()})


def uses_adapter(location: ModelLocation, options: ModelOptions) -> bool:
    """Whether the model is an adapter with its base.

    Raises:
        UserError: the directory holds whole weights, too, and nothing says which is meant; the options do
            not fit the directory.
    """
    path, shown = location.path, f"--model_path {location.name}"
    has_adapter = path.is_dir() and Adapter.is_one(path)
    if options.adapter == "yes" and not has_adapter:
        raise UserError(
            f"--adapter=yes: {shown} has no {ADAPTER_CONFIG}; give the directory of an adapter, or leave "
            "--adapter out"
        )
    used = has_adapter and options.adapter != "no"
    if (
        used
        and options.adapter == "auto"
        and (SavedDecoder.is_one(path) or whole_weight_files(path))
    ):
        raise UserError(
            f"{shown} holds whole weights and an adapter ({ADAPTER_CONFIG}): say which is meant, "
            "--adapter=no for the whole weights alone, or --adapter=yes for the adapter on its base "
            "(--base_model_path, or the one that it names)"
        )
    if options.base_model_path is not None and not used:
        raise UserError(
            f"--base_model_path is the base of an adapter, and {shown} is "
            f"{'read without its adapter (--adapter=no)' if has_adapter else 'none'}: leave it out, or "
            "give the adapter's directory as --model_path"
        )
    return used


def base_of(adapter: Adapter, options: ModelOptions) -> ModelLocation:
    """Where an adapter's base is.

    Raises:
        UserError: it is not there, or nothing names it.
    """
    if options.base_model_path is not None:
        flag = "--base_model_path"
        revision = adapter.config.base_revision
        same = options.base_model_path == adapter.config.base
        return resolve_model(options.base_model_path, revision if same else None, flag=flag)
    named, where = adapter.config.base, adapter.config.where
    if named is None:
        raise UserError(f"{where} names no base model: give it as --base_model_path")
    revision = None if Path(named).exists() else adapter.config.base_revision
    try:
        return resolve_model(named, revision, flag="its base")
    except UserError as error:
        raise UserError(f"{where}: {error}; or give the base as --base_model_path") from error


def _open_whole(location: ModelLocation) -> OpenModel:
    """A model that is no adapter."""
    path = location.path
    if path.is_file():
        file = GgufFile(path)
        raw = file.hf_config()
        family, config = read_config(raw, file.where)
        check_weights(config, family, file)

        def tokenizer() -> LoadedTokenizer:
            return LoadedTokenizer(tokenizer_from_gguf(file), gguf_rule(file))

        return OpenModel(raw, family, config, file, tokenizer, path, _stats([path]))
    files = _stats(sorted(file for file in path.iterdir() if file.is_file()))
    if SavedDecoder.is_one(path):
        saved = SavedDecoder(path)
        family, config = saved.read_config()
        raw, place = saved.description["config"], saved.tokenizer_directory
        notes = config_notes(raw, saved.where)
        made_from = saved.description["source"].get("origin") or {}
        origin = {"converted_from": made_from} if made_from else {}
        return OpenModel(
            raw, family, config, saved, saved.read_tokenizer, place, files, notes, origin
        )
    raw = read_model_config(path)
    family, config = read_config(raw, f"{path}/config.json")
    source = CanonicalSource(SafetensorsDirectory(path), family, config)
    check_weights(config, family, source, closest=source.closest)
    notes = config_notes(raw, f"{path}/config.json")
    if source.edits:
        notes += (f"names of the weights read {source.edits}",)

    def from_directory() -> LoadedTokenizer:
        return tokenizer_from_directory(path)

    return OpenModel(raw, family, config, source, from_directory, path, files, notes)


def _open_adapter(location: ModelLocation, options: ModelOptions) -> OpenModel:
    adapter = Adapter(location.path)
    base_location = base_of(adapter, options)
    path = base_location.path
    if path.is_dir() and Adapter.is_one(path) and not whole_weight_files(path):
        raise UserError(
            f"the base {base_location.name} is an adapter itself: merge it into its own base first, and "
            "give the merged model as --base_model_path"
        )
    base = _open_whole(base_location)
    if isinstance(base.source, SavedDecoder):
        raise UserError(
            f"the base {base_location.name} is a converted checkpoint; give the model that it was "
            "converted from as --base_model_path, and convert the adapter afterwards"
        )
    merge = plan_merge(adapter.config, adapter.tensors, base.family, base.config)
    raw = merged_config(adapter, merge, base.raw, base.family, base.config)
    family, config = read_config(raw, f"{base.source.where} with {adapter.where}")
    source = MergedSource(base.source, adapter, merge, base.family, base.config, config)
    check_weights(config, family, source)
    own = any((location.path / name).is_file() for name in VOCABULARIES)
    if not own:
        _refuse_half_a_tokenizer(location.path)
    place = location.path if own else base.tokenizer_place

    def tokenizer() -> LoadedTokenizer:
        if not own:
            return base.tokenizer()
        loaded = tokenizer_from_directory(location.path)
        _check_vocabulary(loaded, config, adapter)
        return loaded

    files = _stats(sorted(file for file in location.path.iterdir() if file.is_file()))
    files |= {f"base/{name}": stat for name, stat in base.files.items()}
    note = (
        f"adapter {location.name} merged into {base_location.name}: LoRA added to {len(merge.loras)} "
        f"weights, {len(merge.whole)} replaced; tokenizer of the {'adapter' if own else 'base'}"
    )
    origin = {
        "adapter": location.described(),
        "base": base_location.described(),
        "merged": {"lora": len(merge.loras), "replaced": sorted(merge.whole)},
    }
    return OpenModel(
        raw,
        family,
        config,
        source,
        tokenizer,
        place,
        files,
        (note, *base.notes, *merge.notes),
        origin,
    )


def _refuse_half_a_tokenizer(directory: Path) -> None:
    found = [name for name in TOKENIZER_SETTINGS if (directory / name).is_file()]
    if found:
        raise UserError(
            f"{directory} has {' and '.join(found)}, but no tokenizer.json: copy the base's tokenizer.json "
            "beside them, or remove them to use the base's tokenizer as it is"
        )


def _check_vocabulary(loaded: LoadedTokenizer, config: DecoderConfig, adapter: Adapter) -> None:
    """Refuse a tokenizer with tokens that the merged embedding has no row for."""
    vocabulary = loaded.tokenizer.get_vocab()
    beyond = sorted(vocabulary, key=vocabulary.__getitem__)[-1:]
    if beyond and vocabulary[beyond[0]] >= config.vocab_size:
        count = sum(index >= config.vocab_size for index in vocabulary.values())
        raise UserError(
            f"{adapter.where}: its tokenizer has {count} tokens beyond the {config.vocab_size} rows of the "
            f"embedding (such as {beyond[0]!r}), and the adapter has no embedding of its own; save it with "
            "save_embedding_layers=True, or remove its tokenizer's files to use the base's"
        )


def _stats(files: list[Path]) -> FileStats:
    stats = {file.name: file.stat() for file in files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
