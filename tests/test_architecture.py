"""The house rules that a reader relies on: imports run one way, foreign packages stay where they belong, nothing grows too long."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ray_streamer

PACKAGE = Path(ray_streamer.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    (
        "errors",
        "settings",
        "extent",
        "dtypes",
        "units",
        "machine",
        "process_limits",
        "wording",
        "rows",
        "column_bytes",
        "collector",
        "arguments",
    ),
    ("storage",),
    ("files", "named_checkpoint"),
    ("checkpoint",),
    ("slices",),
    ("capture",),
    ("sharding",),
    ("planning",),
    ("staging",),
    ("exchange",),
    ("device",),
    ("rank",),
    ("report",),
    ("cluster",),
    ("doctor",),
    ("api",),
    ("integrations",),
    ("compat",),
    ("testing",),
    ("demo",),
    ("cli",),
)
"""Imports run from later to earlier; names of one line may import each other."""

LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

HOMES = {
    "ray": {"cluster"},
    # api asks torch.distributed which rank this is; demo compares; testing stands in for a GPU
    "torch": {"capture", "device", "rank", "cluster", "api", "doctor", "integrations", "compat", "demo", "testing"},
    "boto3": {"storage", "testing"},
    "botocore": {"storage", "testing"},
    "google": {"storage"},
    "azure": {"storage"},
    "huggingface_hub": {"storage"},
    "click": {"cli"},
    "rich": {"report", "cli", "demo"},
    "vllm": {"integrations"},
    "transformers": {"integrations"},
}
"""Packages that may import a foreign one when they run; naming its types is free."""

FOUNDATION_OF_STORAGE = {"errors", "extent", "process_limits", "units", "wording", "storage"}


@functools.cache
def imports_of(path: Path, *, with_types: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = set()
    if not with_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_parts(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("ray_streamer.")}


def test_imports_run_one_way():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}, which comes after it"
        for path in MODULES
        if (part := part_of(path)) != "__init__"
        for other in own_parts(imports_of(path, with_types=True))
        if LEVELS[other] > LEVELS[part]
    ]
    assert not upward


def test_storage_knows_only_extents_units_and_errors():
    for path in (PACKAGE / "storage").rglob("*.py"):
        assert own_parts(imports_of(path, with_types=True)) <= FOUNDATION_OF_STORAGE, path


@pytest.mark.parametrize("foreign", HOMES)
def test_foreign_packages_stay_at_home(foreign):
    users = {
        part_of(path)
        for path in MODULES
        if any(name.split(".")[0] == foreign for name in imports_of(path, with_types=False))
    }
    assert users <= HOMES[foreign]


def test_importing_the_package_imports_neither_ray_nor_torch():
    code = "import sys, ray_streamer; print({'ray', 'torch', 'boto3', 'pyarrow', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_what_comes_before_landing_imports_no_torch():
    """A driver never needs it; a rank reads headers, plans and meets its neighbours while torch is imported."""
    modules = "ray_streamer.cluster.driver, ray_streamer.cluster.worker, ray_streamer.api.rank, ray_streamer.rank.load"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


PUBLIC = [
    "AccessError",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "CheckpointIndex",
    "ClusterError",
    "CredentialsError",
    "DeviceError",
    "HeaderError",
    "IndexMismatchError",
    "LoadAbortedError",
    "LoadReport",
    "Mesh",
    "Move",
    "ObjectChangedError",
    "ObjectMissingError",
    "Part",
    "PlacementOptions",
    "PlanError",
    "RankContext",
    "RankFailedError",
    "RankSlices",
    "RayStreamerError",
    "ReadPlan",
    "Replicate",
    "ResultSpec",
    "Rule",
    "RuleSlices",
    "Settings",
    "SettingsError",
    "ShardRules",
    "ShardedModel",
    "ShardingError",
    "ShortReadError",
    "Side",
    "Skip",
    "Split",
    "SplitGroups",
    "SplitVocabulary",
    "StartupTimeoutError",
    "StorageError",
    "ThrottledError",
    "errors",
    "load_rank",
    "load_sharded",
    "ls",
    "plan",
    "pull",
    "stream_rank",
    "summarize",
]
"""What people may rely on: a name more or less is a decision, and stands in CHANGELOG.md."""


def test_the_public_names_are_these_and_resolve():
    assert ray_streamer.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(ray_streamer, name) is not None
    assert callable(ray_streamer.plan)


def test_errors_are_there_after_a_bare_import():
    code = "import ray_streamer; assert ray_streamer.errors.StorageError is ray_streamer.StorageError"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_drawing_of_the_packages_is_current():
    path = PACKAGE.parent / "docs" / "write_architecture.py"
    spec = importlib.util.spec_from_file_location("write_architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.drawing() in module.PAGE.read_text(), "run make docs"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_packages_list_modules_that_they_have(path):
    listed = re.findall(r"^ {0,4}(\w+)  +\S", ast.get_docstring(ast.parse(path.read_text())) or "", flags=re.MULTILINE)
    assert set(listed) <= {module.stem for module in path.parent.iterdir()}


def test_every_package_has_its_question_on_the_page_of_the_architecture():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    questions = page[page.index("| package | its question |") : page.index("## Glossary")]
    assert not [path.parent.name for path in PACKAGE.glob("*/__init__.py") if f"`{path.parent.name}`" not in questions]


def test_a_public_class_has_its_name_alone():
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_functions_stay_short():
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {length} lines"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (length := length_of(node)) > 50
    ]
    assert not long


def length_of(function):
    """Lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0
