"""Side by side: this project and other ways to give each rank its slices, in one run.

    python benchmarks/compare.py s3                 from a local S3 server
    python benchmarks/compare.py disk --state warm  from a local disk, files in the page cache
    python benchmarks/compare.py disk --state cold  from a local disk, files not in the page cache

Prints medians and ratios as a table, and everything that was measured as JSON with `--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Task
from harness import Measurement, Ranks, warm_page_cache
from rich.console import Console
from rich.table import Table

from ray_streamer.demo.checkpoint import drop_page_cache
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.s3_server import start_s3_server

MIB = 1 << 20


def make_checkpoint(folder: Path, *, layers: int) -> int:
    """A Llama layout with grouped queries; its tensor bytes."""
    layout = llama_layout(hidden=2048, layers=layers, heads=16, kv_heads=4, intermediate=5632, vocab=32000)
    if not (folder / "config.json").exists():
        write_checkpoint(folder, layout.tensors, num_files=4, config=layout.config)
    return sum(spec.num_bytes for spec in layout.tensors)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all contenders in turn."""
    checkpoint_bytes = make_checkpoint(options.folder, layers=options.layers)
    with ExitStack() as stack:
        uri, server_bytes = str(options.folder), None
        if options.storage == "s3":
            server = stack.enter_context(start_s3_server())
            os.environ.update(server.environment())
            uri = server.upload_folder(options.folder, "benchmark", "model")
            server_bytes = server.bytes_sent
        ranks = stack.enter_context(Ranks(options.tp))
        runs: dict[str, list[Measurement]] = {name: [] for name in CONTENDERS[options.storage]}
        for turn in range(options.rounds + 1):
            for name, measurements in runs.items():
                prepare(options)
                measured = ranks.measure(options.storage, name, tasks(options, uri), server_bytes=server_bytes)
                if turn:
                    measurements.append(measured)
    check_equal(runs)
    return {
        "storage": options.storage,
        "state": options.state,
        "tp": options.tp,
        "checkpoint_bytes": checkpoint_bytes,
        "memory_limit": options.memory_limit * MIB,
        "runs": {name: [asdict(measured) for measured in measurements] for name, measurements in runs.items()},
    }


def prepare(options: argparse.Namespace) -> None:
    """Brings the disk's files into the state that is measured."""
    if options.storage == "disk":
        {"cold": drop_page_cache, "warm": warm_page_cache}[options.state](options.folder)


def tasks(options: argparse.Namespace, uri: str) -> list[Task]:
    """Every rank's task of one run."""
    session = secrets.token_hex(8)
    return [
        Task(
            uri=uri,
            rank=rank,
            world_size=options.tp,
            session=session,
            memory_limit=options.memory_limit * MIB,
        )
        for rank in range(options.tp)
    ]


def check_equal(runs: dict[str, list[Measurement]]) -> None:
    """A contender that loads something else has no time worth knowing."""
    digests = {name: {measured.digest for measured in measurements} for name, measurements in runs.items()}
    if len(set().union(*digests.values())) != 1:
        raise SystemExit(f"the contenders loaded different tensors: {digests}")


def table(result: dict[str, Any]) -> Table:
    """Medians, and ratios to this project."""
    source = "local S3 server" if result["storage"] == "s3" else f"disk, {result['state']}"
    shown = Table(title=f"{source}, tp={result['tp']}, {result['checkpoint_bytes']:,} bytes")
    for heading in ("contender", "seconds", "min-max", "ratio", "CPU s", "extra MiB", "bytes sent / checkpoint"):
        shown.add_column(heading, justify="left" if heading == "contender" else "right")
    first = median(next(iter(result["runs"].values())), "seconds")
    for name, runs in result["runs"].items():
        seconds = [measured["seconds"] for measured in runs]
        sent = runs[0]["server_bytes"]
        shown.add_row(
            name,
            f"{median(runs, 'seconds'):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{median(runs, 'seconds') / first:.2f}x",
            f"{median(runs, 'cpu_seconds'):.2f}",
            f"{median(runs, 'extra_bytes') / MIB:.0f}",
            "-" if sent is None else f"{median(runs, 'server_bytes') / result['checkpoint_bytes']:.3f}x",
        )
    return shown


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(measured[name] for measured in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", choices=sorted(CONTENDERS))
    parser.add_argument("--state", choices=("warm", "cold"), default="warm")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one that is not")
    parser.add_argument("--layers", type=int, default=10, help="about 98 MB each, and 262 MB of embeddings")
    parser.add_argument("--memory-limit", type=int, default=64, help="staging MiB per rank of this project")
    parser.add_argument("--folder", type=Path, default=Path(".demo/benchmark"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options)
    Console(stderr=options.json, width=120).print(table(result))
    if options.json:
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
