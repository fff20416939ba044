"""What `make` is told to run is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ["check", "test-vllm", "bench", "bench-all", "simulate", "gpu-check", "docs"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize("target", TARGETS)
def test_files_and_folders_of_a_command_exist(target):
    commands = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"(?<=\s)(?:tests|benchmarks|docs|examples)(?:/[\w.-]+)*", commands))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
