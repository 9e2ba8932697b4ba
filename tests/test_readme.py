"""What the README and the page of the clients tell people to type exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from millibert.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIENTS = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def commands(page: str = README) -> list[str]:
    joined = page.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.startswith("    millibert ")]


def test_there_are_commands_to_check():
    assert {shlex.split(command)[1] for command in commands()} == set(COMMANDS)


@pytest.mark.parametrize("command", [*commands(), *commands(CLIENTS)])
def test_every_command_of_the_pages_parses(command):
    _, name, *arguments = shlex.split(command)
    module = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.configure(parser)
    _, unknown = parser.parse_known_args(arguments)
    assert unknown == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name):
    documentation = importlib.import_module(COMMANDS[name].module).__doc__ or ""
    assert f"millibert {name} " in documentation


def test_the_python_of_the_readme_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_command_of_the_readme():
    assert "\n    make test " in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
