"""Which attributes of a config.json transformers reads for a model type, found in its source.

Nothing is imported: the syntax trees of its files are searched, so any version will do, without PyTorch.
An attribute counts as read if one of these names it:

- the config class of the model type or a class that it inherits from: a field, a parameter, an alias, a
  keyword that it takes out of its arguments, or `self.NAME`;
- the model's own code: `config.NAME`, or NAME in `getattr` and `hasattr` of a config;
- code of all models that the model's code imports: ropes, masks, heads, `PreTrainedModel`.

What only checks a config or tells what it allows (`validate...`, `supports...`) computes nothing and does
not count. Neither does the cache, which one forward pass fills and never reads.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Modules of transformers that compute for many models. What a model imports of them is followed.
SHARED = ("modeling_rope_utils", "masking_utils", "modeling_attn_mask_utils", "modeling_layers")
ROPE_MODULE, ROPE_MIXIN = "modeling_rope_utils", "RotaryEmbeddingConfigMixin"
_CHECK = re.compile(r"_*(validate|check|supports|rope_scaling_validation|rope_config_validation)")
# In the code of ropes these only tell nested objects from flat ones, which the reader does itself.
_NESTING = frozenset({"layer_types", "_rope_type_labels"})


@dataclasses.dataclass(frozen=True)
class SourceReads:
    """What one version of transformers reads.

    Attributes:
        attributes: name -> the values that the source states as its default: none or several. A key of a
            rope's object that only this model's code reads is "rope.NAME".
        everywhere: the same, of the classes that all configs and all models inherit from.
        ropes: kind of rope -> the keys of its object that it is made of.
        generation: settings of text generation, which older files keep in config.json.
    """

    attributes: dict[str, list[Any]]
    everywhere: dict[str, list[Any]]
    ropes: dict[str, list[str]]
    generation: list[str]


def read_source(root: Path, model_type: str) -> SourceReads | None:
    """What the transformers in a directory reads for a model type; None if it does not know it.

    Args:
        root: the directory that holds configuration_utils.py.
        model_type: as in config.json.
    """
    found = _config_class(root, model_type)
    if found is None:
        return None
    path, name = found
    own, everywhere = _Reads(), _Reads()
    for module, config_class in _hierarchy(path, name):
        if module.parent == path.parent or module.parent.parent == root / "models":
            own.add_config_class(config_class)
        elif module.name == "configuration_utils.py":
            everywhere.add_config_class(config_class, methods=("__init__", "__post_init__"))
    everywhere.add(_tree(root / "modeling_utils.py"))
    for shared in (
        "rope_theta",
        "rope_scaling",
    ):  # only handed on to the class of a model with ropes
        everywhere.names.pop(shared, None)
    # A composite's config class is in the file of the part's, and so is the model's code.
    modeling = path.with_name(path.name.replace("configuration_", "modeling_", 1))
    own.add(_tree(modeling), ropes=True)
    for module_name, names in _shared_imports(modeling).items():
        without = _NESTING if module_name == ROPE_MODULE else frozenset[str]()
        for node in _reached(root / f"{module_name}.py", names):
            own.add(node, without=without)
    mixin = _definitions(root / f"{ROPE_MODULE}.py").get(ROPE_MIXIN)
    if ROPE_MODULE in _shared_imports(modeling) and isinstance(mixin, ast.ClassDef):
        own.add_config_class(mixin, without=_NESTING)
    return SourceReads(own.names, everywhere.names, _rope_kinds(root), _generation(root))


class _Reads:
    """Collects the names of attributes, with their stated defaults."""

    def __init__(self) -> None:
        self.names: dict[str, list[Any]] = {}

    def note(self, name: str, default: ast.expr | None = None) -> None:
        defaults = self.names.setdefault(name, [])
        try:
            value = ast.literal_eval(default) if default is not None else ...
        except ValueError:
            return
        if value is not ... and not isinstance(value, set | bytes) and value not in defaults:
            defaults.append(list(value) if isinstance(value, tuple) else value)

    def merge(self, other: "_Reads", without: frozenset[str]) -> None:
        for name, defaults in other.names.items():
            if name not in without:
                mine = self.names.setdefault(name, [])
                mine.extend(value for value in defaults if value not in mine)

    def add(
        self,
        tree: ast.AST,
        *,
        of_config: bool = False,
        ropes: bool = False,
        without: frozenset[str] = frozenset(),
    ) -> None:
        """All reads in a tree.

        Args:
            tree: a module, a class or a function.
            of_config: whether it is a config class, so that `self` is the config and `kwargs` are the
                file's attributes.
            ropes: whether to note keys of a rope's object, too.
            without: names that do not count.
        """
        found = _Reads()
        called = {id(node.func) for node in _walk(tree) if isinstance(node, ast.Call)}
        for node in _walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if id(node) not in called and _is_config(node.value, of_config):
                    found.note(node.attr)
            elif isinstance(node, ast.Call):
                found._add_call(node, of_config, ropes)
            elif isinstance(node, ast.Compare) and of_config:
                is_key = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
                if is_key and _is_named(node.comparators[0], "kwargs"):
                    found.note(ast.literal_eval(node.left))
            elif ropes and isinstance(node, ast.Subscript) and _is_rope(node.value):
                key = node.slice.value if isinstance(node.slice, ast.Constant) else None
                if isinstance(key, str):
                    found.note(f"rope.{key}")
        self.merge(found, without)

    def _add_call(self, node: ast.Call, of_config: bool, ropes: bool) -> None:
        texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if not texts or not isinstance(texts[0], str):
            return
        name = texts[0]
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            if _is_config(node.args[0], of_config):
                self.note(name, node.args[2] if len(node.args) > 2 else None)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            default = node.args[1] if len(node.args) > 1 else None
            if of_config and _is_named(node.func.value, "kwargs"):
                self.note(name, default)
            elif ropes and _is_rope(node.func.value):
                self.note(f"rope.{name}")

    def add_config_class(
        self,
        node: ast.ClassDef,
        *,
        methods: tuple[str, ...] | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        """A config class: its fields, its parameters, its aliases, and what its methods read.

        Args:
            node: the class.
            methods: the methods that count; None for all.
            without: names that do not count in methods.
        """
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                if "ClassVar" not in ast.unparse(part.annotation):
                    self.note(part.target.id, _field_default(part.value))
            elif isinstance(part, ast.Assign) and _is_named(part.targets[0], "attribute_map"):
                if isinstance(part.value, ast.Dict):
                    for key in part.value.keys:
                        self.note(ast.literal_eval(key))  # type: ignore[arg-type]
            elif isinstance(part, ast.FunctionDef) and (methods is None or part.name in methods):
                if part.name == "__init__":
                    arguments = part.args.args[1:] + part.args.kwonlyargs
                    defaults = [*part.args.defaults, *part.args.kw_defaults]
                    padding = [None] * (len(arguments) - len(defaults))
                    for argument, default in zip(arguments, padding + defaults, strict=True):
                        self.note(argument.arg, default)
                self.add(part, of_config=True, without=without)


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those of functions that only check."""
    rest = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef) and _CHECK.match(node.name):
            continue
        yield node
        rest.extend(ast.iter_child_nodes(node))


def _is_named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_config(node: ast.expr, of_config: bool) -> bool:
    """Whether an expression is a config: `config`, `self.config`, `config.get_text_config()`."""
    if isinstance(node, ast.Call):
        function = node.func
        return isinstance(function, ast.Attribute) and function.attr == "get_text_config"
    if isinstance(node, ast.Name):
        return node.id.endswith("config") or (of_config and node.id == "self")
    return isinstance(node, ast.Attribute) and node.attr.endswith("config")


def _is_rope(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and "rope" in ast.unparse(node)


def _field_default(value: ast.expr | None) -> ast.expr | None:
    """The default of a field; of one with a check, `check(...)(default=VALUE)`."""
    if isinstance(value, ast.Call):
        return next((k.value for k in value.keywords if k.arg == "default"), None)
    return value


@functools.lru_cache(maxsize=64)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8") if path.is_file() else "")


def _definitions(path: Path) -> dict[str, ast.stmt]:
    """What a module defines at its top level: name -> class, function or assignment."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def _reached(path: Path, names: Iterable[str]) -> list[ast.stmt]:
    """The definitions of a module that these names use, directly or through others."""
    definitions = _definitions(path)
    rest, seen = [name for name in names if name in definitions], set[str]()
    while rest:
        name = rest.pop()
        if name not in seen:
            seen.add(name)
            used = (node.id for node in _walk(definitions[name]) if isinstance(node, ast.Name))
            rest.extend(one for one in used if one in definitions)
    return [definitions[name] for name in sorted(seen)]


def _shared_imports(path: Path) -> dict[str, list[str]]:
    """Shared module -> the names that a model's code imports from it."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] in SHARED:
            module = (node.module or "").split(".")[-1]
            found.setdefault(module, []).extend(alias.name for alias in node.names)
    return found


def _config_class(root: Path, model_type: str) -> tuple[Path, str] | None:
    """The file and the name of the config class with this `model_type`."""
    stated = f"model_type = {model_type!r}"
    for path in _config_files(root).get(model_type, ()):
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef) and stated in map(ast.unparse, node.body):
                return path, node.name
    return None


@functools.lru_cache(maxsize=4)
def _config_files(root: Path) -> dict[str, list[Path]]:
    """Model type -> the files that mention it as one's `model_type`."""
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "models").glob("*/configuration_*.py")):
        for name in re.findall(
            r"""^    model_type = ["'](.+)["']$""", path.read_text("utf-8"), re.M
        ):
            found.setdefault(name, []).append(path)
    return found


def _hierarchy(path: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """A class and those that it inherits from, with their files."""
    node = _definitions(path).get(name)
    if isinstance(node, ast.ClassDef):
        yield path, node
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from _hierarchy(_origin(path, base.id), base.id)


def _origin(path: Path, name: str) -> Path:
    """The file that defines a name which a module uses."""
    for node in ast.walk(_tree(path)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level
            and node.module
            and name in (alias.asname or alias.name for alias in node.names)
        ):
            folder = path.parents[node.level - 1]
            return folder.joinpath(*node.module.split(".")).with_suffix(".py")
    return path


def _rope_kinds(root: Path) -> dict[str, list[str]]:
    """Kind of rope -> the keys that its function takes from the rope's object or the config."""
    path = root / f"{ROPE_MODULE}.py"
    table = _definitions(path).get("ROPE_INIT_FUNCTIONS")
    kinds: dict[str, list[str]] = {}
    for node in ast.walk(table) if table is not None else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Name):
                    reads = _Reads()
                    for one in _reached(path, [value.id]):
                        reads.add(one, ropes=True)
                    names = {name.removeprefix("rope.") for name in reads.names}
                    kinds[str(key.value)] = sorted(names)
    return kinds


def _generation(root: Path) -> list[str]:
    """The settings of text generation."""
    reads = _Reads()
    node = _definitions(root / "generation" / "configuration_utils.py").get("GenerationConfig")
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            reads.add(part, of_config=True)
    return sorted(reads.names)
