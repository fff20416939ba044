"""Who is compared? Ways to bring one rank's slices into its memory, each a function of the same arguments.

Every contender returns the same tensors: this rank's slices, in fresh memory of its own, equal bit for bit. They differ in what
they read and through what. Slices are those of the project's rules; what is compared is how the bytes travel.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.testing.parts import window_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.planning.read_plan import ReadPlan

RANGE_BYTES = 8 << 20
NUM_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One rank's part of one run.

    Attributes:
        uri: The checkpoint.
        rank: This rank.
        world_size: Ranks, all on one node.
        session: Name of this run.
        memory_limit: Staging bytes per rank, where a contender knows such a limit.
    """

    uri: str
    rank: int
    world_size: int
    session: str
    memory_limit: int


Tensors = dict[str, Any]


def ray_streamer(task: Task) -> Tensors:
    """This project: each byte read once by one rank, shared over the node."""
    from ray_streamer import Settings, load_rank

    return load_rank(
        task.uri,
        rank=task.rank,
        world_size=task.world_size,
        session=task.session,
        settings=Settings.resolve(memory_limit=task.memory_limit),
    )


def s3_whole_files(task: Task) -> Tensors:
    """Every rank streams every byte of every file and keeps its slices."""
    return _from_s3(task, wants_whole=lambda window, shape: True)


def s3_slices_and_rows(task: Task) -> Tensors:
    """Every rank reads its contiguous slices by range, and tensors that are cut inside rows as a whole."""
    return _from_s3(
        task,
        wants_whole=lambda window, shape: any(
            cut.stop - cut.start < size for cut, size in zip(window[1:], shape[1:], strict=True)
        ),
    )


def safetensors_slices(task: Task) -> Tensors:
    """Every rank maps every file by safetensors and copies its slices out: `safe_open`, `get_slice`, clone."""
    from safetensors import safe_open

    plan = _plan(task)
    tensors: dict[str, Any] = {}
    for number, file in enumerate(plan.index.files):
        with safe_open(os.path.join(task.uri, file.path), "pt") as opened:
            for position in _tensors_of(plan, number):
                window = window_of(plan.index, plan.slices[task.rank], position)
                name = plan.index.names[position]
                tensors[name] = opened.get_slice(name)[window].clone()
    return tensors


CONTENDERS: dict[str, dict[str, Callable[[Task], Any]]] = {
    "s3": {
        "ray_streamer": ray_streamer,
        "whole files on every rank": s3_whole_files,
        "slices and whole rows": s3_slices_and_rows,
    },
    "disk": {
        "ray_streamer": ray_streamer,
        "safe_open, get_slice, clone": safetensors_slices,
    },
}
"""By storage, this project first."""


def _plan(task: Task) -> ReadPlan:
    from ray_streamer.api.plan import plan

    return plan(task.uri, task.world_size)


def _tensors_of(plan: ReadPlan, file: int) -> list[int]:
    return [position for position in range(len(plan.index)) if plan.index.file_ids[position] == file]


def _from_s3(task: Task, *, wants_whole: Callable[[Any, tuple[int, ...]], bool]) -> Tensors:
    """Reads one file after the other: its wanted ranges by boto3 with threads, then copies the slices out of them."""
    import boto3
    import torch
    from botocore.config import Config

    plan = _plan(task)
    bucket, _, prefix = task.uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3", config=Config(max_pool_connections=NUM_THREADS))
    staged = torch.empty(max(file.size_bytes for file in plan.index.files), dtype=torch.uint8)
    memory = memoryview(staged.numpy())

    def fetch(key: str, start: int, stop: int) -> None:
        body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
        while start < stop:
            start += body.readinto(memory[start:stop])

    tensors: dict[str, Any] = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for number, file in enumerate(plan.index.files):
            wanted = [_wanted(plan, position, task.rank, wants_whole) for position in _tensors_of(plan, number)]
            key = f"{prefix}/{file.path}"
            list(pool.map(lambda cut, key=key: fetch(key, *cut), _cut(wanted)))
            for position in _tensors_of(plan, number):
                window, extent = window_of(plan.index, plan.slices[task.rank], position), plan.index.extent_of(position)
                dtype = getattr(torch, plan.index.dtype_of(position).torch_name)
                whole = staged[extent.start : extent.stop].view(dtype).reshape(plan.index.shape_of(position))
                tensors[plan.index.names[position]] = whole[window].clone()
    return tensors


def _wanted(plan: ReadPlan, position: int, rank: int, wants_whole: Callable[..., bool]) -> tuple[int, int]:
    """Byte range of the file that the rank reads for one tensor."""
    window, shape = window_of(plan.index, plan.slices[rank], position), plan.index.shape_of(position)
    extent = plan.index.extent_of(position)
    if wants_whole(window, shape):
        return extent.start, extent.stop
    row_bytes = extent.num_bytes // shape[0]
    return extent.start + window[0].start * row_bytes, extent.start + window[0].stop * row_bytes


def _cut(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Touching ranges joined, then cut into requests."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return [(at, min(at + RANGE_BYTES, stop)) for start, stop in joined for at in range(start, stop, RANGE_BYTES)]
