"""What README says of the families is what the tables and the tests hold."""

import json
from collections import Counter
from pathlib import Path

import family_models
import tiny_models

from jaxgrad.models.families import FAMILIES
from jaxgrad.checkpoints.gguf_families import GGUF_FAMILIES

ROOT = Path(__file__).resolve().parent.parent
HEAD = (
    "| models | `model_type` | tiny models held to PyTorch | published sizes met | GGUF |",
    "|---|---|---|---|---|",
)


def family_table() -> list[str]:
    tiny = Counter(model.model_type for model in family_models.MODELS.values())
    tiny["llama"] += len(tiny_models.ZOO)
    published: dict[str, list[str]] = {}
    entries = json.loads((ROOT / "tests" / "published_configs.json").read_text("utf-8"))
    for name, entry in entries.items():
        published.setdefault(entry["model_type"], []).append(name)
    in_gguf = {family.model_type: "yes" for family in GGUF_FAMILIES.values()}
    in_gguf["mistral"] = "as `llama`"  # llama.cpp's converter has one name for both
    rows = [
        f"| {family.title} | `{family.model_type}` | {tiny[family.model_type]} "
        f"| {', '.join(published[family.model_type])} "
        f"| {in_gguf.get(family.model_type, 'no')} |"
        for family in FAMILIES.values()
    ]
    return [*HEAD, *rows]


def test_the_readme_s_table_of_families_is_generated():
    text = (ROOT / "README.md").read_text("utf-8")
    table = "\n".join(family_table())
    assert table in text, f"put this table into README.md:\n\n{table}"


def test_every_file_of_the_package_stands_in_the_readme_s_tree():
    text = (ROOT / "README.md").read_text("utf-8")
    tree = text[text.index("```\njaxgrad/") :]
    tree = tree[: tree.index("```\n", 4)]
    parts = {path.name for path in (ROOT / "jaxgrad").iterdir() if path.name != "__pycache__"}
    parts |= {path.name for path in (ROOT / "bin").iterdir() if not path.name.startswith("_")}
    assert all(part.removesuffix(".py") in tree for part in parts - {"__init__.py"})
