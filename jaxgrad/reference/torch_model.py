"""The model of the reference: transformers' own, with all of its weights from the files.

transformers gives a weight that it does not find a random value and only warns. Here that is an error, and
names with a wrapper's prefix are fitted by a rule of this file's own. An adapter is merged by PEFT.
transformers also reads GGUF files, if its reader takes in all that the file says (plain Llama).
"""

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jaxgrad.checkpoints.adapters import Adapter
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.opening import base_of, uses_adapter
from jaxgrad.checkpoints.places import resolve_model
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.errors import UserError
from jaxgrad.options import ModelOptions

INSTALL = "pip install '.[reference]'"

try:
    import torch
except ModuleNotFoundError as error:
    raise UserError(f"the comparison needs PyTorch, which is not installed: {INSTALL}") from error

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_forward_module|_fpw_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)
# What stands in front of all names of a model inside another one.
LEADS = (
    "",
    "model.",
    "base_model.model.",
    "base_model.model.model.",
    "model.model.",
    "base_model.",
)


def load_torch_model(
    model_path: str | None, *, dtype: str = "float32", options: ModelOptions = ModelOptions()
) -> Any:
    """The transformers model for a path, in eval mode with eager attention.

    Args:
        model_path: as `jaxgrad.load_model` takes it.
        dtype: "float32" or "float64".
        options: an adapter's base, and a hub id's revision.

    Raises:
        UserError: there is no such model, weights are missing, or a package for reading it is.
    """
    location = resolve_model(model_path, options.revision)
    if uses_adapter(location, options):
        base = base_of(Adapter(location.path), options)
        model = _with_adapter(_load_whole(base.path), location.path)
    else:
        model = _load_whole(location.path)
    if dtype == "float64":
        _to_double(model)
    return model


def _load_whole(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if SavedDecoder.is_one(path):
        raise UserError(
            f"--model_path {path} is a converted checkpoint, which PyTorch cannot read; give the "
            "model that it was converted from"
        )
    # Without `trust_remote_code` no code from the model's directory runs.
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "local_files_only": True,
    }
    if path.is_file():
        file = GgufFile(path)
        if not _transformers_reads(file):
            return _build_from_gguf(file)
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(f"transformers reads a GGUF file only with accelerate: {INSTALL}")
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, **options
        ).eval()
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path), output_loading_info=True, **options
        )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        model = _load_stripped(type(model), path, options, sorted(info["missing_keys"]))
    return model.eval()


def _load_stripped(kind: Any, directory: Path, options: dict[str, Any], missing: list[str]) -> Any:
    """The model of a directory whose names have prefixes: the first reading that leaves none missing.

    Raises:
        UserError: there is none.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    stored = {}
    for path in sorted(directory.glob("*.safetensors")):
        if not path.name.startswith("adapter_"):
            stored.update({_WRAPPER.sub("", n): values for n, values in load_file(path).items()})
    config = AutoConfig.from_pretrained(directory)
    for lead in LEADS:
        if not all(name.startswith(lead) for name in stored):
            continue
        named = {name.removeprefix(lead): values for name, values in stored.items()}
        with _quiet():
            loaded = kind.from_pretrained(
                None, config=config, state_dict=named, output_loading_info=True, **options
            )
        model, info = loaded
        if not (info["missing_keys"] or info["mismatched_keys"]):
            return model
    raise UserError(
        f"{directory}: transformers finds no weights for {len(missing)} names "
        f"({', '.join(missing[:4])}), with and without the prefixes of wrappers; save the model again with "
        "the names of its class"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of missing weights, which are looked at here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _with_adapter(model: Any, directory: Path) -> Any:
    """The model with an adapter, merged by PEFT in float64 and rounded to float32 once, as ours is.

    Raises:
        UserError: PEFT is not installed, or does not find all of the adapter's weights.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise UserError(
            "the comparison of a model with an adapter needs PEFT, which is not installed: pip install peft"
        ) from error
    from safetensors import safe_open

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        saved = [
            key for key in file.offset_keys() if re.search(rf"{name}(\.base_layer)?\.weight$", key)
        ]
        rows = {file.get_slice(key).get_shape()[0] for key in saved}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if rows - {embedding.weight.shape[0]}:
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        merged = PeftModel.from_pretrained(model.double(), str(directory)).merge_and_unload()
    lost = [
        str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)
    ]
    if lost:
        raise UserError(f"{directory}: {' '.join(lost[0].split())[:300]}; take all of its files")
    return merged.float().eval()


def _transformers_reads(file: GgufFile) -> bool:
    """Whether transformers' own GGUF reader takes in all that the file says.

    It does not read scaled ropes and biases of Llama files. Of other architectures it leaves out soft caps
    and query scales, or cannot load them at all.
    """
    attributes = file.hf_config().keys()
    return file.architecture == "llama" and not attributes & {
        "rope_scaling",
        "attention_bias",
        "mlp_bias",
    }


def _build_from_gguf(file: GgufFile) -> Any:
    """transformers' model with the config and weights that our own GGUF reader finds."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw = file.hf_config()
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = {name: torch.tensor(file.read(name)) for name in file.shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise UserError(f"{file.where}: its weights do not fit transformers' {raw['model_type']}")
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def float32_means_float64() -> Iterator[None]:
    """Inside the block `torch.float32`, `torch.float` and `Tensor.float()` mean double precision.

    transformers' models say float32 and mean "at least float32": for the mean square of a norm, the
    softmax, the rotary frequencies and angles. After `model.double()` this rounds down, and the results
    are accurate to 1e-7 only. All Python code sees the changed names; PyTorch's kernels do not read them.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _to_double(model: Any) -> None:
    model.double()
    with float32_means_float64():
        for module in model.modules():
            # These were computed in float32. `double()` does not make them more accurate.
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(module.config)
            elif hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
