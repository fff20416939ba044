"""What the documents say is true of the code: names exist, commands parse, pages are not stale."""

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import ray_streamer
from ray_streamer.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON_SOURCES = [pytest.param(path.read_text(), id=path.name) for path in sorted((ROOT / "examples").glob("*.py"))]
PYTHON_SOURCES += [pytest.param(block, id="README") for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)]
COMMANDS = [line for line in README.splitlines() if line.startswith("ray-streamer ")]


@pytest.mark.parametrize("source", PYTHON_SOURCES)
def test_python_of_the_documents_compiles_and_uses_public_names(source):
    tree = ast.parse(source)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray_streamer"
    }
    used |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "ray_streamer"
        for alias in node.names
    }
    modules = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray_streamer.")
    }
    assert used | modules
    assert used <= set(ray_streamer.__all__)
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("source", PYTHON_SOURCES)
def test_arguments_in_the_documents_exist(source):
    known = {
        name: set(inspect.signature(getattr(ray_streamer, name)).parameters)
        for name in ("load_sharded", "load_rank", "stream_rank", "plan")
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in known:
            assert {keyword.arg for keyword in node.keywords} <= known[node.func.attr]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_in_the_readme_parse(line):
    _, name, *args = shlex.split(line)
    context = click.Context(main)
    command = main.get_command(context, name)
    with command.make_context(name, args, parent=context):
        pass


def test_the_readme_shows_every_command():
    context = click.Context(main)
    assert {shlex.split(line)[1] for line in COMMANDS} == set(main.list_commands(context))


@pytest.mark.parametrize("name", ["inspect", "plan", "load", "demo"])
def test_the_overview_and_the_commands_agree(name):
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    assert command.help


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:examples|docs|ray_streamer)/[\w./]+)`|\]\(([\w./]+)\)", README):
        assert (ROOT / "".join(name)).exists(), name


def test_the_settings_page_is_not_stale():
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "docs" / "write_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == module.PAGE.read_text(), "run make docs"


def test_versions_are_pinned_and_portable():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {"torch==2.13.0", "ray==2.60.0"} <= set(pins)
