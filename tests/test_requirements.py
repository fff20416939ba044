"""What pyproject.toml promises is what is tested: the lower of the versions in the two files of constraints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^([\w.-]+)==(\d+)\.(\d+)", (ROOT / name).read_text(), re.MULTILINE)
    return {package.lower(): (int(major), int(minor)) for package, major, minor in lines}


def test_minimums_are_the_lowest_versions_that_are_tested():
    tested = [pins("constraints.txt"), pins("constraints-vllm.txt")]
    minimums = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    lowest = {name: min(versions[name] for versions in tested if name in versions) for name in minimums}
    assert {name: tuple(map(int, version.split("."))) for name, version in minimums.items()} == lowest


def test_the_python_that_is_tested_is_the_one_that_is_named():
    named = [
        classifier.rpartition(" ")[2]
        for classifier in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d", classifier)
    ]
    header = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert named == re.findall(r"Python (3\.\d+)", header) == [PROJECT["requires-python"].removeprefix(">=")]
