"""The example of a replica with ranks of its own: one that loses a rank is replaced, rather than answer 500 from then on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import llama_layout
from ray_streamer.testing.s3_server import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(450),
    pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="Ray Serve is not installed here"),
]


def test_a_replica_that_loses_a_rank_is_replaced(tmp_path: Path) -> None:
    layout = llama_layout(64, 2, 4, 4, 128, 256)
    folder = write_checkpoint(tmp_path / "llama", layout.tensors, num_files=2, config=layout.config)
    command = [sys.executable, Path(__file__).with_name("serve_replica_process.py"), str(folder), str(free_port())]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    # With its dashboard's packages installed, Ray starts slowly on a busy machine.
    environment = os.environ | {"PYTHONPATH": path, "RAY_raylet_start_wait_time_s": "150"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    answers = [line.partition("ANSWER ")[2] for line in ended.stdout.splitlines() if line.startswith("ANSWER ")]
    assert (ended.returncode, len(answers)) == (0, 1), ended.stdout[-3000:] + ended.stderr[-6000:]
    said = json.loads(answers[0])
    assert len(said["first"]["parameters"]) == 4
    assert said["after_a_rank_was_killed"] == said["first"]
    assert (said["num_ranks"], said["first_ranks_alive"]) == ([4, 4], 0)
