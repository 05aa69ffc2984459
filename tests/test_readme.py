"""README's tree and commands are those of the checkout. (Its generated tables: `test_docs`.)"""

import os
import re
from pathlib import Path

from jaxgrad.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_every_file_of_the_package_is_in_the_tree():
    tree = README[README.index("```\njaxgrad/") :]
    tree = tree[: tree.index("```\n", 4)]
    parts = {path.name for path in (ROOT / "jaxgrad").iterdir() if path.name != "__pycache__"}
    parts |= {path.name for path in (ROOT / "bin").iterdir() if not path.name.startswith("_")}
    missing = [name for name in parts - {"__init__.py"} if name.removesuffix(".py") not in tree]
    assert not missing, f"put these into README's tree: {missing}"


def test_the_commands_that_it_names_exist():
    named = set(re.findall(r"\bbin/(\w+)", README))
    assert {"demo", "test"} <= named <= {"demo", "test", *COMMANDS}
    assert all(os.access(ROOT / "bin" / name, os.X_OK) for name in named)
    assert f"`jaxgrad {'|'.join(COMMANDS)}`" in README
