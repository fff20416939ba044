"""What becomes of many small tensors, or files, on S3? Requests that the plan says, that the server saw, and seconds.

    python benchmarks/request_counts.py

One rank loads each checkpoint from a local RADOS Gateway. Opening reads the json files and every header; the rest are the plan's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import ray_streamer
from ray_streamer import Replicate, Settings
from ray_streamer.planning.summary import summarize
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.s3_server import S3Server, start_s3_server

CASES = (
    ("100,000 tensors of 2 KiB in 8 files", 100_000, (32, 32), 8),
    ("10,000 tensors of 16 KiB in 10,000 files", 10_000, (128, 64), 10_000),
)


def measure(server: S3Server, title: str, num_tensors: int, shape: tuple[int, int], num_files: int) -> None:
    """Prints one line."""
    tensors = [(f"model.experts.{number}.weight", "BF16", shape) for number in range(num_tensors)]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), tensors, num_files=num_files, config={"model_type": "experts"})
        uri = server.upload_folder(folder, f"requests-{num_files}", num_threads=8)
    arguments = {"rules": {"*": Replicate()}, "settings": Settings.resolve(memory_limit="128MiB")}
    before = server.requests()
    started = time.perf_counter()
    plan = ray_streamer.plan(uri, **arguments)
    opening_seconds = time.perf_counter() - started
    num_opening = server.requests() - before
    before = server.requests()
    started = time.perf_counter()
    ray_streamer.load_rank(uri, rank=0, world_size=1, **arguments)
    seconds = time.perf_counter() - started
    num_loading = server.requests() - before - num_opening
    print(
        f"{title:42} {num_opening:8} {opening_seconds:8.2f} {summarize(plan).requests:8} {num_loading:8} {seconds:8.2f}",
        flush=True,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with start_s3_server("rgw") as server:
        os.environ |= server.environment()
        print(f"{'checkpoint':42} {'opening:':>8} {'':>8} {'loading:':>8} {'':>8} {'opening and':>8}")
        print(f"{'':42} {'requests':>8} {'seconds':>8} {'planned':>8} {'seen':>8} {'loading s':>8}")
        for case in CASES:
            measure(server, *case)


if __name__ == "__main__":
    main()
