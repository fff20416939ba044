"""A checkpoint may have more files than a process may have descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

NUM_FILES = 400

PROGRAM = """
import json, os, resource, sys
import ray_streamer
from ray_streamer.settings import Settings
folder, cases = sys.argv[1], json.loads(sys.argv[2])
ray_streamer.load_rank(folder + "/few", rules={"*": ray_streamer.Replicate()})  # everything is imported
for limit, options in cases:
    before = set(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    settings = Settings.resolve(**options)
    most = []
    tensors = {}
    for name, tensor in ray_streamer.stream_rank(folder, rules={"*": ray_streamer.Replicate()}, settings=settings):
        tensors[name] = tensor
        most.append(len(os.listdir("/proc/self/fd")))
    assert len(ray_streamer.plan(folder, rules={"*": ray_streamer.Replicate()}).index) == len(tensors)
    assert set(os.listdir("/proc/self/fd")) == before, "descriptors are left open"
    print(len(tensors), int(sum(tensor.sum() for tensor in tensors.values())), max(most) - len(before))
"""


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    weight_map = {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        # Some are large enough to be read by O_DIRECT.
        save_file({f"t.{number}": np.ones((1 << 15) if number % 8 == 0 else 64, "f4")}, folder / file)
        weight_map[f"t.{number}"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "few").mkdir()
    save_file({"t": np.ones(64, "f4")}, folder / "few" / "model.safetensors")
    return folder


CASES = [
    (64, {"page_cache": "on"}),
    (64, {"page_cache": "off", "direct_io": "off"}),
    (64, {"page_cache": "off", "direct_io": "on", "concurrency": 200}),
    (256, {"page_cache": "auto", "direct_io": "auto"}),
]


def test_descriptors_do_not_grow_with_the_number_of_files(many_files):
    # Not those of whoever runs the tests.
    command = [sys.executable, "-c", PROGRAM, str(many_files), json.dumps(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, close_fds=True, check=False, env=os.environ.copy())
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    num_large = -(-NUM_FILES // 8)
    for (limit, options), line in zip(CASES, lines, strict=True):
        num_tensors, total, most = map(int, line.split())
        assert num_tensors == NUM_FILES, options
        assert total == num_large * (1 << 15) + (NUM_FILES - num_large) * 64, options
        assert most < limit // 2, options
