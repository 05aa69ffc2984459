"""What `bin/test --fast` leaves out exists."""

import ast
from pathlib import Path

from conftest import WHOLE_MODULES, WHOLE_TESTS

TESTS = Path(__file__).resolve().parent


def test_every_name_in_conftest_is_a_module_or_a_test():
    modules = {path.stem: path for path in TESTS.glob("test_*.py")}
    assert modules.keys() >= WHOLE_MODULES
    for name in WHOLE_TESTS:
        module, _, test = name.partition("::")
        tree = ast.parse(modules[module].read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in defined and module not in WHOLE_MODULES, name
