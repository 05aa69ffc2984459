"""LoRA adapters of tiny models, made and merged by PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import parameters, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxgrad
from jaxgrad.checkpoints import LoadedModel
from jaxgrad.options import ModelOptions

Q_AND_V = ("q_proj", "v_proj")


def make_adapter(base: Path, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """An adapter as PEFT saves it, with random values in every part that is trained.

    Args:
        base: the base model's directory.
        directory: will be made.
        seed: of the values.
        options: of PEFT's `LoraConfig`.
    """
    options = {"r": 3, "lora_alpha": 7, "target_modules": list(Q_AND_V)} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options)
        )
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
        model.save_pretrained(directory)
    return directory


def merged_by_peft(base: Path, adapter: Path, directory: Path, dtype: Any = torch.float32) -> Path:
    """The directory of the model that PEFT's `merge_and_unload` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(directory)
    for path in base.glob("tokenizer*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def load_adapter(adapter: Path, base: Path | None = None, dtype: str = "float32") -> LoadedModel:
    options = ModelOptions(base_model_path=None if base is None else str(base))
    return jaxgrad.load_model(str(adapter), dtype=dtype, options=options)


def assert_merged_alike(ours: LoadedModel, theirs: LoadedModel, tolerance: float = 3e-7) -> None:
    """Same config; every parameter within `tolerance` of its largest value."""
    assert ours.config == theirs.config
    mine, wanted = parameters(ours), parameters(theirs)
    assert mine.keys() == wanted.keys()
    for name, values in wanted.items():
        values = values.astype(np.float64)
        error = np.abs(mine[name].astype(np.float64) - values).max()
        assert error <= tolerance * np.abs(values).max(), (name, error)


def change_config(adapter: Path, **attributes: Any) -> Path:
    """The adapter with other attributes; `...` removes one."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | attributes
    write_json(path, {name: value for name, value in config.items() if value is not ...})
    return adapter


def tensors_of(adapter: Path) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def change_tensors(adapter: Path, **tensors: np.ndarray | None) -> Path:
    """The adapter with other tensors, by the end of their names; None removes one, a new name adds one."""
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for end, values in tensors.items():
        found = [name for name in weights if name.endswith(end)] or [end]
        assert len(found) == 1, found
        if values is None:
            del weights[found[0]]
        else:
            weights[found[0]] = values
    save_file(weights, path)
    return adapter
