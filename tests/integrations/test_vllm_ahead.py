"""What a load inside vLLM would import is imported before it; needs no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

LOADS = """
import json, sys
import torch
from ray_streamer.api.rank import load_rank
from ray_streamer.integrations.captured_slices import CapturedSlices
from ray_streamer.integrations.vllm.ahead import prepare_load
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage

uri, session, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = Settings.resolve(s3_access_key_id="AKIDEXAMPLE", s3_secret_access_key="secret", s3_region="eu-west-1")
for place in ("no scheme at all", "nobody://knows/it", uri, "s3://bucket/model"):
    prepare_load(place, settings).join()
before = set(sys.modules)
target = torch.zeros(4, 8)

def load(tensors):
    for _, tensor in tensors:
        target.copy_(tensor[4 * rank : 4 * rank + 4])

slices = CapturedSlices(uri, settings, load=load, targets=lambda: {"target": target}, skips=lambda name: False)
load_rank(uri, slices=slices, out=slices.out, rank=rank, world_size=2, session=session, settings=settings)
open_storage("s3://bucket/model", settings).close()
late = [name for name in sys.modules if name not in before and name.partition(".")[0] in OURS]
print(json.dumps({"late": late, "target": target.tolist()}))
"""
OURS = ("ray_streamer", "numpy", "pyarrow", "boto3", "botocore", "h11")


def test_nothing_is_imported_by_the_load_itself(tmp_path):
    stored = np.arange(64, dtype=np.float32).reshape(8, 8)
    save_file({"weight": stored}, tmp_path / "model.safetensors")
    program = LOADS.replace("OURS", repr(OURS))
    session = f"ahead-{tmp_path.name}-{tmp_path.parent.name}"
    # Not forked from one process: a thread that ends at that moment holds a lock of OpenSSL, which the child would wait for.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), session, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        with process:
            said, wrong = process.communicate(timeout=300)
        assert process.returncode == 0, wrong
        assert json.loads(said) == {"late": [], "target": stored[4 * rank : 4 * rank + 4].tolist()}
        assert "Traceback" not in wrong
