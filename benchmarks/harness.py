"""How is it measured? Rank processes that stay, contenders in turn, everything counted from outside of them.

All contenders run in the same processes, round by round, each with fresh result tensors; imports are paid before. Wall seconds
are from the moment that all ranks are told to start until the last one is done. CPU seconds are the ranks' own. Memory is the
peak of what the ranks add to the node (anonymous memory of their processes plus shared memory of the machine, sampled), less
the result tensors: pages of the page cache that are only mapped do not count, arenas count once.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import CONTENDERS, Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one contender.

    Attributes:
        seconds: Wall time.
        cpu_seconds: User and system time of all ranks.
        extra_bytes: Peak memory of the node beyond baseline and result tensors.
        server_bytes: Bytes that the storage server sent, or None where there is no server.
        digest: Of all ranks' tensors; equal for contenders that loaded the same.
    """

    seconds: float
    cpu_seconds: float
    extra_bytes: int
    server_bytes: int | None
    digest: str = field(repr=False)


class Ranks:
    """The rank processes of one benchmark; use as a context manager."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def measure(
        self, storage: str, contender: str, tasks: list[Task], *, server_bytes: Callable[[], int] | None
    ) -> Measurement:
        """Runs one contender once on all ranks."""
        pids = [process.pid for process in self._processes]
        sent_before = server_bytes() if server_bytes else 0
        with PeakMemory(pids) as memory:
            started = time.perf_counter()
            for pipe, task in zip(self._pipes, tasks, strict=True):
                pipe.send((storage, contender, task))
            for pipe in self._pipes:
                _expect(pipe.recv(), "done")
            seconds = time.perf_counter() - started
        sent = server_bytes() - sent_before if server_bytes else None
        for pipe in self._pipes:
            pipe.send("digest")
        results = [pipe.recv() for pipe in self._pipes]
        return Measurement(
            seconds=seconds,
            cpu_seconds=sum(result["cpu_seconds"] for result in results),
            extra_bytes=memory.peak_bytes - memory.baseline_bytes - sum(result["num_bytes"] for result in results),
            server_bytes=sent,
            digest=hashlib.sha256("".join(result["digest"] for result in results).encode()).hexdigest(),
        )


class PeakMemory:
    """Samples the memory of processes while a block runs."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.baseline_bytes = self.peak_bytes = self._now()

    def _now(self) -> int:
        total = _kilobytes(Path("/proc/meminfo"), "Shmem")
        return (total + sum(_kilobytes(Path(f"/proc/{pid}/status"), "RssAnon") for pid in self._pids)) << 10

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._now())


def warm_page_cache(folder: Path) -> None:
    """Reads a folder's files, so that the next run finds them in memory."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(f"{path} has no {name}")


def _expect(message: Any, expected: str) -> None:
    if message != expected:
        raise RuntimeError(f"a rank failed: {message}")


def _serve(rank: int, pipe: Connection) -> None:
    """One rank: runs what it is told, keeps the tensors until it was asked for their digest."""
    import torch

    torch.set_num_threads(1)
    import boto3
    import safetensors

    import ray_streamer.api.rank  # noqa: F401

    del boto3, safetensors
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        storage, contender, task = order
        before = os.times()
        try:
            tensors = CONTENDERS[storage][contender](task)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            continue
        after = os.times()
        pipe.send("done")
        pipe.recv()
        result = {
            "cpu_seconds": after.user + after.system - before.user - before.system,
            "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "digest": _digest(tensors),
        }
        # Answered when the memory is given back: the next baseline is taken after that.
        del tensors
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pipe.send(result)


def _digest(tensors: dict[str, Any]) -> str:
    import torch

    digest = hashlib.blake2b()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
