"""The commands: one function each behind `jaxgrad NAME`, `python -m jaxgrad NAME` and `bin/NAME`."""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxgrad.commands import COMMANDS, huge_pages
from jaxgrad.options import (
    CHOICES,
    DTYPE_NAMES,
    METHODS,
    PRECISIONS,
    PROTOCOL_NAMES,
    AnalyzeOptions,
)

ROOT = Path(__file__).resolve().parent.parent
MODULE = [sys.executable, "-m", "jaxgrad"]
INSTALLED = [str(Path(sys.executable).with_name("jaxgrad"))]


def call(command: Sequence[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def helps() -> dict[str, "subprocess.CompletedProcess[str]"]:
    """--help of every command, with what was imported on stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "jaxgrad"]
    return {name: call([*command, name, "--help"]) for name in COMMANDS}


def imported(done: "subprocess.CompletedProcess[str]") -> set[str]:
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_the_command_was_called_and_waits_for_no_jax(helps, name):
    assert helps[name].returncode == 0
    assert helps[name].stdout.startswith(f"usage: python -m jaxgrad {name} [")
    assert "absl" in imported(helps[name]) and not {"jax", "flax"} & imported(helps[name])
    from_checkout = call([sys.executable, f"bin/{name}", "--help"])
    told = helps[name].stdout.replace("python -m jaxgrad ", "bin/")
    assert (from_checkout.returncode, from_checkout.stdout) == (0, told)


def test_every_command_is_in_bin():
    names = {path.name for path in (ROOT / "bin").iterdir() if "." not in path.name}
    assert names - {"__pycache__", "demo", "test"} == set(COMMANDS)


def test_the_installed_command():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="jaxgrad")
    assert entry.value == "jaxgrad.__main__:main"
    done = call([*INSTALLED, "--help"])
    assert done.returncode == 0 and done.stdout.startswith("usage: jaxgrad COMMAND")
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert call([*INSTALLED, "export", "--help"]).stdout.startswith("usage: jaxgrad export [")


def test_version():
    done = call([*MODULE, "--version"])
    assert done.stdout == f"jaxgrad {importlib.metadata.version('jaxgrad')}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no command is given"),
        (["analyse"], "'analyse' is no command"),
        (["--data_path=f"], "'--data_path=f' is no command"),
    ],
)
def test_an_unknown_command_is_refused_in_one_line(arguments, told):
    done = call([*MODULE, *arguments])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {told}; there are analyze, ")


# flags


def test_every_option_is_a_flag_with_its_default_and_its_choices(helps):
    shown = helps["analyze"].stdout
    choices = {"protocol": PROTOCOL_NAMES, "chat": CHOICES, "layerwise": CHOICES}
    choices |= {"method": METHODS, "precision": PRECISIONS, "dtype": DTYPE_NAMES}
    for field in dataclasses.fields(AnalyzeOptions):
        (line,) = re.findall(rf"^  --(?:\[no\])?{field.name}\b.*$", shown, re.MULTILINE)
        default = {False: "no", None: None}.get(field.default, field.default)
        assert (f"(default: {default})" in line) == (default is not None), line
        assert "|".join(choices.get(field.name, ())) in line


# huge pages


def test_a_program_restarts_once_and_only_where_it_is_jaxgrad():
    def starts(*command: str) -> int:
        kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command],
            env=kept, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stderr.count("imported package\n")

    times = 2 if sys.platform == "linux" else 1
    assert starts("-m", "jaxgrad", "--version") == times
    assert starts("bin/export", "--help") == times
    program = "import jaxgrad, jaxgrad.__main__ as m; m.dispatch(['--version'])"
    assert starts("-c", program) == 1


def test_the_restart_keeps_the_command_line_and_a_user_s_setting(monkeypatch):
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "jaxgrad", "study", "--limit=2"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    huge_pages.restart_with_huge_pages()
    assert not calls
    monkeypatch.delenv("GLIBC_TUNABLES")
    huge_pages.restart_with_huge_pages()
    again = [sys.executable, "-m", "jaxgrad", "study", "--limit=2"]
    assert calls == [(sys.executable, again)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
