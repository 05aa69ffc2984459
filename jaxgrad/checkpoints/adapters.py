"""A base model's weights with a LoRA adapter, in PEFT's form, merged into them.

A weight W [O, I] becomes W + s B A with A [r, I], B [O, r] and s = alpha / r, or alpha / sqrt(r) if rank
stabilized. GPT-2 stores W as [I, O]; an embedding [V, D] has A [r, V] and B [D, r]: both take the
transpose. Modules that were trained whole replace those of the base.

Each weight is merged when it is read, block by block. Sum and product are float64. The merged weight is
float32, or float64 where the base or the adapter is.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrad.checkpoints.lora_config import LoraConfig, read_lora_config
from jaxgrad.checkpoints.lora_plan import Merge
from jaxgrad.checkpoints.sources import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    Addition,
    SafetensorsFiles,
    WeightSource,
    refuse_pickles,
)
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family


class Adapter:
    """An adapter's directory: its config and the shapes of its weights.

    Raises:
        UserError: it is no plain LoRA, or has no weights.
    """

    def __init__(self, directory: Path) -> None:
        self.where, self.directory = str(directory), directory
        self.config: LoraConfig = read_lora_config(directory)
        if not (directory / ADAPTER_NAME).is_file():
            refuse_pickles(directory, "save the adapter again with safe_serialization=True")
            raise UserError(f"{directory} has no {ADAPTER_NAME}; download the adapter again")
        self.tensors = SafetensorsFiles(str(directory / ADAPTER_NAME), [directory / ADAPTER_NAME])

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether a directory holds an adapter."""
        return (directory / ADAPTER_CONFIG).is_file()

    def read(self, name: str) -> np.ndarray:
        """A tensor's values.

        Raises:
            UserError: it cannot be read, or holds values that are not finite.
        """
        values = self.tensors.read(name)
        if not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise UserError(
                f"{self.tensors.where}: {name} holds values that are not finite; the training has "
                "diverged or the file is damaged: take an earlier checkpoint of the adapter"
            )
        return values


class MergedSource:
    """The weights of a base with an adapter's.

    Args:
        base: the base's weights.
        adapter: the adapter.
        merge: from `plan_merge`.
        family: of both.
        base_config: of the base.
        config: of the merged model.
    """

    def __init__(
        self,
        base: WeightSource,
        adapter: Adapter,
        merge: Merge,
        family: Family,
        base_config: DecoderConfig,
        config: DecoderConfig,
    ) -> None:
        self.where = f"{base.where} with the adapter {adapter.where}"
        self._base, self._adapter, self._merge = base, adapter, merge
        self._base_names = {name: name for name in base.shapes()}
        embedding, head = family.keys["embedding"].name, family.keys["lm_head.weight"].name
        if base_config.tied_embeddings and not config.tied_embeddings:
            self._base_names[head] = embedding
        elif config.tied_embeddings and embedding in merge.whole:
            self._base_names.pop(head, None)  # a copy of the embedding that is replaced

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight's name and shape, in the cheapest order to read."""
        shapes, whole = self._base.shapes(), self._adapter.tensors.shapes()
        found = {name: shapes[base] for name, base in self._base_names.items()}
        return found | {name: whole[tensor] for name, tensor in self._merge.whole.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of the merged weight."""
        stored, lora = self._stored_dtype(name), self._merge.loras.get(name)
        if lora is None:
            return stored
        parts = [self._adapter.tensors.dtype(part) for part in (lora.left, lora.right) if part]
        return np.dtype(np.float64 if np.float64 in (stored, *parts) else np.float32)

    def _stored_dtype(self, name: str) -> np.dtype:
        if name in self._merge.whole:
            return self._adapter.tensors.dtype(self._merge.whole[name])
        return self._base.dtype(self._base_names[name])

    def why_unreadable(self, name: str) -> str | None:
        """Why the weight cannot be read; None if it can. The adapter's were looked at before."""
        if name in self._merge.whole:
            return None
        return self._base.why_unreadable(self._base_names[name])

    def read(self, name: str) -> np.ndarray:
        """The values before the addition, in the dtype of the file."""
        if name in self._merge.whole:
            return self._adapter.read(self._merge.whole[name])
        return self._base.read(self._base_names[name])

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values; a large tensor comes in blocks of rows."""
        if name in self._merge.whole:
            return self._adapter.tensors.read_blocks(self._merge.whole[name])
        return self._base.read_blocks(self._base_names[name])

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the same values."""
        if name in self._merge.whole:
            return self._adapter.tensors.read_part(self._merge.whole[name], part)
        return self._base.read_part(self._base_names[name], part)

    def addition(self, name: str) -> Addition | None:
        """What LoRA adds to the weight."""
        lora = self._merge.loras.get(name)
        if lora is None:
            return None
        left = self._adapter.read(lora.left)
        if lora.right is None:
            left, right = left[:, None], np.ones(1, np.float32)
        else:
            right = self._adapter.read(lora.right)
        if lora.flipped:
            left, right = left.T, right.T
        kinds = (lora.left.rpartition("lora_")[2], (lora.right or "").rpartition("lora_")[2])
        return Addition(left, right, lora.scale, kinds, self.dtype(name))


def merged_config(
    adapter: Adapter,
    merge: Merge,
    raw: dict[str, Any],
    family: Family,
    config: DecoderConfig,
) -> dict[str, Any]:
    """The config.json of the merged model: the adapter may resize the vocabulary and untie the head.

    Raises:
        UserError: LoRA on a tied weight, which leaves open whether the other side changes.
    """
    embedding, head = family.keys["embedding"].name, family.keys["lm_head.weight"].name
    changes: dict[str, Any] = {}
    shapes = adapter.tensors.shapes()
    sizes = {
        name: shapes[merge.whole[name]][0] for name in (embedding, head) if name in merge.whole
    }
    if set(sizes.values()) - {config.vocab_size}:
        alone = not config.tied_embeddings and len(sizes) == 1
        if alone or len(set(sizes.values())) > 1:
            told = " and ".join(f"{name} has {rows} rows" for name, rows in sizes.items())
            raise UserError(
                f"{adapter.where}: {told}, the base's vocabulary {config.vocab_size}: the adapter must "
                "hold head and embedding of one size; save it with save_embedding_layers=True"
            )
        changes["vocab_size"] = next(iter(sizes.values()))
    touched = [name for name in (embedding, head) if name in merge.loras]
    if config.tied_embeddings and touched:
        raise UserError(
            f"{adapter.where}: LoRA on {' and '.join(touched)}, but the base ties head and embedding "
            "(tie_word_embeddings): in training one of the two changed, in PEFT's merge both do; save the "
            "base untied (tie_word_embeddings false, lm_head as a weight of its own) and give it as "
            "--base_model_path"
        )
    if config.tied_embeddings and not merge.saved.isdisjoint({embedding, head}):
        if adapter.config.keeps_tied:
            raise UserError(
                f"{adapter.config.where}: ensure_weight_tying with modules_to_save on a tied head is not "
                "read here; merge it with PEFT (merge_and_unload) and give the merged model"
            )
        changes["tie_word_embeddings"] = False
    if not changes:
        return raw
    if isinstance(raw.get("text_config"), dict):
        return raw | changes | {"text_config": raw["text_config"] | changes}
    return raw | changes
