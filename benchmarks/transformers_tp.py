"""Side by side: a model of transformers, tensor-parallel on two ranks, through this project and through transformers' own loading.

    python benchmarks/transformers_tp.py --rounds 3 --json transformers_tp.json

    from a local S3 server    this project's from_pretrained; a download with boto3 by the first rank, then transformers' own
    from disk, warm           both, with the files in the page cache

Ranks are processes that stay, joined by gloo; all ways take turns in them, and a first round that is not counted pays imports. Seconds
are from the moment that both ranks are told until both have the model. Memory is the peak of what the ranks add to the node, parameters
included, as in `ray_streamer.testing.peak_memory`: pages of the page cache do not count, nor do parameters that stay mapped to a file. Parameters must be equal.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from side_by_side.page_cache import warm_page_cache

from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.peak_memory import PeakMemory, allocated_bytes
from ray_streamer.testing.s3_server import S3Server, start_s3_server

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

NUM_RANKS = 2
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Places:
    """Where the model is.

    Attributes:
        uri: In S3.
        folder: On disk.
        downloads: A folder for copies; each run has a new one.
    """

    uri: str
    folder: Path
    downloads: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load on all ranks.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Of all ranks.
        added_bytes: Peak of what the ranks add to the node's memory.
        parameter_bytes: Of all ranks.
        sent_bytes: What the S3 server sent.
        digest: Of all parameters.
    """

    seconds: float
    cpu_seconds: float
    added_bytes: int
    parameter_bytes: int
    sent_bytes: int
    digest: str


def through_us(place: str) -> Any:
    from transformers import LlamaForCausalLM

    from ray_streamer.integrations.transformers import from_pretrained

    return from_pretrained(LlamaForCausalLM, place, dtype="bfloat16")


def through_transformers(place: str) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=NUM_RANKS, tp_plan="auto")
    return LlamaForCausalLM.from_pretrained(place, dtype="bfloat16", distributed_config=config)


def after_a_download(places: Places, rank: int) -> Any:
    """The first rank of the node downloads; boto3 asks for parts of each file in ten threads."""
    import boto3
    import torch.distributed as dist

    copy = places.downloads / "copy"
    if rank == 0:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        bucket, _, prefix = places.uri.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        for path in places.folder.iterdir():
            client.download_file(bucket, f"{prefix}/{path.name}", str(copy / path.name))
    dist.barrier()
    return through_transformers(str(copy))


Way = Callable[[Places, int], Any]
WAYS: dict[str, Way] = {
    "S3: ray_streamer": lambda places, _: through_us(places.uri),
    "S3: download, then transformers": after_a_download,
    "disk: ray_streamer": lambda places, _: through_us(str(places.folder)),
    "disk: transformers": lambda places, _: through_transformers(str(places.folder)),
}


def serve(rank: int, pipe: Connection, meeting: str, places: Places) -> None:
    """One rank: loads as it is told, and says what it has."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS)
    pipe.send("ready")
    while (way := pipe.recv()) is not None:
        before = os.times()
        model = WAYS[way](places, rank)
        after = os.times()
        pipe.send("done")
        pipe.recv()
        digest, num_bytes = hashlib.blake2b(), 0
        for name, parameter in sorted(model.named_parameters()):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            digest.update(name.encode())
            digest.update(local.detach().contiguous().view(torch.uint8).numpy())
            num_bytes += local.nbytes
        del model, parameter, local
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pipe.send((after.user + after.system - before.user - before.system, num_bytes, digest.hexdigest()))


def measure(way: str, pipes: list[Connection], pids: list[int], server: S3Server) -> Run:
    """One load on all ranks."""
    sent = server.bytes_sent()
    with PeakMemory(pids, shared_bytes=allocated_bytes) as memory:
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send(way)
        for pipe in pipes:
            pipe.recv()
        seconds = time.perf_counter() - started
    for pipe in pipes:
        pipe.send("digest")
    answers = [pipe.recv() for pipe in pipes]
    return Run(
        seconds=seconds,
        cpu_seconds=sum(cpu_seconds for cpu_seconds, _, _ in answers),
        added_bytes=memory.added_bytes,
        parameter_bytes=sum(num_bytes for _, num_bytes, _ in answers),
        sent_bytes=server.bytes_sent() - sent,
        digest=",".join(digest for _, _, digest in answers),
    )


def run(rounds: int, layers: int, scratch: Path) -> tuple[dict[str, list[Run]], int]:
    """Every way in turn, and the bytes of the checkpoint's tensors."""
    layout = llama_layout(hidden=2048, layers=layers, heads=16, kv_heads=4, intermediate=5632, vocab=32000)
    folder = write_checkpoint(scratch / "model", layout.tensors, num_files=4, config=layout.config)
    with start_s3_server() as server:
        os.environ.update(server.environment(), RAY_STREAMER_CACHE_DIR=str(scratch / "cache"))
        places = Places(server.upload_folder(folder, "benchmark", "model"), folder, scratch)
        context = multiprocessing.get_context("spawn")
        pipes: list[Connection] = []
        processes = []
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs, str(scratch / "meeting"), places), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way, measured in runs.items():
                warm_page_cache(folder)
                one = measure(way, pipes, [process.pid for process in processes], server)
                measured += [one] if turn else []
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
    if len({one.digest for measured in runs.values() for one in measured}) != 1:
        raise SystemExit("the ways loaded different parameters")
    return runs, sum(spec.num_bytes for spec in layout.tensors)


def table(runs: dict[str, list[Run]], num_bytes: int) -> Table:
    """Medians."""
    first = next(iter(runs.values()))
    parameters = f"{first[0].parameter_bytes / MIB:.0f} MiB of parameters on {NUM_RANKS} ranks"
    shown = Table(title=f"{num_bytes:,} bytes, {parameters}, medians of {len(first)}")
    for heading in ("way", "seconds", "min-max", "CPU s", "peak MiB", "bytes sent / checkpoint"):
        shown.add_column(heading, justify="left" if heading == "way" else "right")
    for way, measured in runs.items():
        seconds = [one.seconds for one in measured]
        shown.add_row(
            way,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{statistics.median(one.cpu_seconds for one in measured):.2f}",
            f"{statistics.median(one.added_bytes for one in measured) / MIB:.0f}",
            f"{statistics.median(one.sent_bytes for one in measured) / num_bytes:.3f}",
        )
    return shown


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=9, help="9 are 1.07 GB")
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs, num_bytes = run(options.rounds, options.layers, Path(scratch))
    Console().print(table(runs, num_bytes))
    if options.json:
        options.json.write_text(json.dumps({way: [asdict(one) for one in measured] for way, measured in runs.items()}))


if __name__ == "__main__":
    main()
