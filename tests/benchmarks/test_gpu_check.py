"""The GPU check runs where there is no GPU, no Ray and no package beyond the core, and says that it measured nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu_check"

BLOCKED = (
    "ray",
    "psutil",
    "pydantic",
    "boto3",
    "botocore",
    "click",
    "rich",
    "moto",
    "transformers",
)
"""What a machine with a GPU and a torch need not have."""

WITHOUT_PACKAGES = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_PACKAGES, ",".join(blocked), str(SCRIPT), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu-check")
    (folder / "cold").mkdir()
    few = ("--megabytes", "2", "--processes", "2", "--storage-seconds", "0.02")
    arguments = ("--fake", *few, "--folder", str(folder))
    done = _run(BLOCKED, *arguments, "--cold-folder", str(folder / "cold"), "--json", str(folder / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "NO MEASUREMENT" in done.stdout
    assert not list(folder.glob("gpu-check-*")), "files were left"
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_it_says_that_it_measured_nothing(result):
    assert result["machine"]["is_measurement"] is False
    assert result["machine"]["device"] == "none: a runtime without a GPU"


@pytest.mark.slow
def test_every_dtype_slice_and_way_to_copy_is_compared(result):
    assert result["correctness"]["tensors"] > 1000
    assert result["correctness"]["wrong"] == []


@pytest.mark.slow
def test_every_figure_is_there(result):
    assert [row["run_bytes"] for row in result["copies"]["runs"]] == [64 << shift for shift in range(11)]
    assert all(row[f"{way}_gbps"] > 0 for row in result["copies"]["runs"] for way in ("engine", "packed", "cut"))
    assert result["copies"]["pinned_ceiling_gbps"] > 0
    assert [row["tp"] for row in result["loads"]] == [1, 4]
    assert all(row["load_seconds"] > 0 for row in result["loads"])
    assert [(row["processes"], row["wrong"]) for row in result["sharing"]] == [(2, [])]
    streams = (1, 2, 4, 8, 16, 32, 64)
    shared = [(readers, number) for readers in (1, 2, 4, 8) for number in streams if number >= readers]
    assert [(row["readers"], row["streams"]) for row in result["storage"]] == shared
    assert all(row["GB/s"] > 0 and row["CPU s/GB"] > 0 for row in result["storage"])
    for state in ("warm", "cold"):
        peers = result[f"peers, {state}"]
        assert {"ray_streamer", "safetensors.torch.load_file"} <= {
            n for n, row in peers["whole"].items() if "ratio" in row
        }
        assert all("ratio" in row for row in peers["slices"].values())


def test_what_is_missing_is_named():
    done = _run(("pyarrow", "safetensors"), "--fake")
    assert done.returncode == 2
    assert "gpu-check needs pyarrow, safetensors, which" in done.stderr
