"""What the documents say is true of the code: names, files, links and variables exist, commands parse, pages are not stale."""

import ast
import importlib.util
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

import ray_streamer
from ray_streamer.cli import main
from ray_streamer.settings import ENV_PREFIX, REPLACE_RUNAI, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/bench/README.md",
]
EACH_PAGE = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])


def blocks_of(page, language):
    """What stands between ```language and ```, less the indentation of a list that it stands in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indentation}", "", block, flags=re.MULTILINE) for indentation, block in found]


PYTHON_SOURCES = [pytest.param(path.read_text(), id=path.name) for path in sorted((ROOT / "examples").glob("*.py"))]
PYTHON_SOURCES += [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks_of(page, "python"))
    if "ray_streamer" in block
]
COMMANDS = {
    page: [line for block in blocks_of(page, "bash") for line in block.splitlines() if line.startswith("ray-streamer ")]
    for page in PAGES
}


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


@pytest.mark.parametrize("line", sorted({line for lines in COMMANDS.values() for line in lines}))
def test_commands_in_the_documents_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files that commands would write
    _, name, *args = shlex.split(line, comments=True)
    if "--html" in args:
        pytest.importorskip("plotly")
    context = click.Context(main)
    command = main.get_command(context, name)
    with command.make_context(name, args, parent=context):
        pass


def test_the_readme_shows_every_command():
    context = click.Context(main)
    assert {shlex.split(line)[1] for line in COMMANDS[ROOT / "README.md"]} == set(main.list_commands(context))


@pytest.mark.parametrize("name", ["inspect", "plan", "load", "demo"])
def test_the_overview_and_the_commands_agree(name):
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    assert command.help


def anchors_of(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_links_lead_to_files_and_headings(page):
    for file_name, anchor in re.findall(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / file_name if file_name else page
        assert target.exists(), file_name
        assert not anchor or anchor in anchors_of(target), anchor


@EACH_PAGE
def test_files_that_the_documents_name_exist(page):
    text = page.read_text()
    names = re.findall(r"(?<![\w/-])((?:benchmarks|docs|examples|ray_streamer|tests)/[\w./]*\w)(?![\w*<-])", text)
    assert [name for name in names if not (ROOT / name).exists()] == []


@EACH_PAGE
def test_variables_extras_and_make_targets_in_the_documents_exist(page):
    text = page.read_text()
    # RAY_STREAMER_NAME stands for all of them.
    known = {REPLACE_RUNAI, f"{ENV_PREFIX}NAME", *(f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields)}
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z0-9_]*[A-Z0-9]", text)) <= known
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name for names in re.findall(r"(?:ray_streamer|\.)\[([\w,]+)\]", text) for name in names.split(",")}
    assert extras <= set(project["optional-dependencies"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join([*blocks_of(page, "bash"), *re.findall(r"`(make [^`]+)`", text)])
    assert set(re.findall(r"^make ([\w-]+)", commands, re.MULTILINE)) <= targets


def test_the_settings_page_is_not_stale():
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "docs" / "write_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == module.PAGE.read_text(), "run make docs"


def test_versions_are_pinned_and_portable():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {"torch==2.13.0", "ray==2.60.0"} <= set(pins)
