"""A GGUF file as the Hugging Face directory that it was made from, with the published tokenizer's form.

By hand, for the embedded model: python tests/gguf_directory.py DIRECTORY
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxgrad.checkpoints.gguf_source import GgufFile

# What SmolLM2's published tokenizer_config.json says of its class.
MISLEADING = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
CONTROL, USER_DEFINED = 3, 4  # types of tokens in GGUF


def write_directory(path: Path, directory: Path) -> Path:
    """Weights, config and tokenizer of a SmolLM2 file as safetensors and tokenizer.json."""
    file = GgufFile(path)
    directory.mkdir(parents=True)
    save_file({name: file.read(name) for name in file.shapes()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(file.hf_config()))

    def entry(name: str) -> Any:
        return file.metadata(f"tokenizer.ggml.{name}")

    assert entry("pre") == "smollm"
    tokens, types = entry("tokens"), entry("token_type")
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in entry("merges")],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == CONTROL)
            backend.add_tokens([added])
    backend.save(str(directory / "tokenizer.json"))
    config = MISLEADING | {"chat_template": file.metadata("tokenizer.chat_template")}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        token_id = entry(f"{theirs}_token_id")
        if token_id is not None:
            config[f"{ours}_token"] = tokens[token_id]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


if __name__ == "__main__":
    from jaxgrad.checkpoints.places import resolve_model

    print(write_directory(resolve_model(None).path, Path(sys.argv[1])))
