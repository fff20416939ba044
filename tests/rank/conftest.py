"""Ranks as threads of this process over a real storage, whose reads are recorded and can be held back or failed."""

from __future__ import annotations

import gc
import json
import secrets
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.device import open_device
from ray_streamer.dtypes import dtype_named
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.rank.load import RankLoad
from ray_streamer.settings import Settings
from ray_streamer.slices import RankSlices
from ray_streamer.storage import open_storage
from ray_streamer.testing.oracle import bytes_of, expected_results
from ray_streamer.testing.parts import TensorPart, even_parts, slices_of_parts
from ray_streamer.testing.possessions import descriptors, mappings_of, package_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import torch

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.extent import Extent
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.planning.topology import Topology
    from ray_streamer.storage.base import Storage

HANG_SECONDS = 120.0
NO_PAGE_CACHE = Settings(page_cache="off")

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""


class RecordingStorage:
    """A real storage, and what was read of it.

    `before_read(path, extent, count)` may wait, or raise in place of a read; the residency of files is what the test says.
    """

    def __init__(
        self,
        inner: Storage,
        before_read: Callable[[str, Extent, int], None] | None,
        resident_paths: Collection[str],
    ) -> None:
        self._inner = inner
        self._before_read = before_read
        self._resident_paths = resident_paths
        self._lock = threading.Lock()
        self.reads: list[tuple[str, Extent]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_resident(self, path: str) -> bool:
        return path in self._resident_paths

    def read_into(self, path: str, extent: Extent, buffer: memoryview, **keywords: Any) -> None:
        with self._lock:
            self.reads.append((path, extent))
            count = len(self.reads)
        if self._before_read is not None:
            self._before_read(path, extent, count)
        self._inner.read_into(path, extent, buffer, **keywords)


@dataclass
class Running:
    """Ranks that load, one thread each."""

    plan: ReadPlan
    sessions: list[NodeSession]
    loads: list[RankLoad]
    storages: list[RecordingStorage]
    results: list[Any] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Running:
        self.results = [None] * len(self.loads)
        for position in range(len(self.loads)):
            # The name must not look like one of the package's own threads.
            thread = threading.Thread(target=self._run, args=(position,), name=f"test-rank-{position}", daemon=True)
            self.threads.append(thread)
            thread.start()
        return self

    def _run(self, position: int) -> None:
        try:
            with self.sessions[position] as session:
                session.wait_met()
                self.results[position] = self.loads[position].run()
        except BaseException as error:
            self.results[position] = error

    def join(self) -> list[Any]:
        """What every rank returned or raised; storages are closed then."""
        for position, thread in enumerate(self.threads):
            thread.join(HANG_SECONDS)
            if thread.is_alive():
                for session in self.sessions:
                    session.fail(TimeoutError("the test gave up"))
                raise AssertionError(f"rank {position} did not end: {self.loads[position].statistics()}")
        self.close()
        return self.results

    def close(self) -> None:
        for owned in (*self.sessions, *self.storages):
            owned.close()

    def tensors(self) -> list[dict[str, Any]]:
        """Every rank's tensors; raises what the first failed rank raised."""
        for result in self.join():
            if isinstance(result, BaseException):
                raise result
        return self.results


def _write_file(path: Path, tensors: Sequence[TensorSpec], *, padding: int, seed: int) -> None:
    """A shard file whose data begins at an odd place when `padding` says so."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in tensors:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype_named(dtype).num_bits // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(entries).encode() + b" " * padding
    data = np.random.default_rng(seed).integers(0, 256, offset, dtype=np.uint8).tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _write(folder: Path, tensors_by_file: Sequence[Sequence[TensorSpec]], *, padding: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(tensors_by_file):
        _write_file(folder / f"{number:05d}.safetensors", tensors, padding=padding, seed=number)
    return folder


def _open_index(uri: str) -> CheckpointIndex:
    storage = open_storage(uri, NO_PAGE_CACHE)
    try:
        return open_checkpoint(uri, storage)
    finally:
        storage.close()


def _plan(
    uri: str,
    slices: dict[str, tuple[TensorPart | None, ...]] | Sequence[RankSlices],
    *,
    topology: Topology,
    block_bytes: int = 4096,
    min_run_bytes: int = 0,
    max_gap_bytes: int = 0,
) -> ReadPlan:
    index = _open_index(uri)
    limits = ReadLimits(block_bytes=block_bytes, min_run_bytes=min_run_bytes, max_gap_bytes=max_gap_bytes)
    nothing = [RankSlices.from_rows(index, [], [])] * topology.num_ranks
    said = slices_of_parts(index, slices) or nothing if isinstance(slices, dict) else slices
    return plan_reads(index, said, topology, limits)


def _prepare(
    plan: ReadPlan,
    *,
    ranks: Sequence[int] | None = None,
    session: str | None = None,
    memory_limit: int = 4096,
    concurrency: int = 4,
    startup_timeout_seconds: float = HANG_SECONDS,
    neighbour_timeout_seconds: float = HANG_SECONDS,
    progress_timeout_seconds: float = HANG_SECONDS,
    before_read: dict[int, Callable[[str, Extent, int], None]] | None = None,
    devices: dict[int, Any] | None = None,
    resident_paths: Collection[str] = (),
    is_staged: bool = False,
    out_by_rank: Sequence[dict[str, torch.Tensor]] | None = None,
    **load_arguments: Any,
) -> Running:
    session = session or secrets.token_hex(8)
    _sessions.append(session)
    ranks = range(plan.topology.num_ranks) if ranks is None else ranks
    storages = [
        RecordingStorage(
            open_storage(plan.index.uri, NO_PAGE_CACHE),
            (before_read or {}).get(rank),
            resident_paths,
        )
        for rank in ranks
    ]
    loads, sessions = [], []
    for rank, storage in zip(ranks, storages, strict=True):
        node = plan.topology.node_of(rank)
        place = Place(
            session=f"{session}-{node}",
            rank=rank,
            ranks=plan.topology.nodes[node],
            node=f"node-{node}",
            timeouts=Timeouts(
                startup_seconds=startup_timeout_seconds,
                neighbour_seconds=neighbour_timeout_seconds,
                progress_seconds=progress_timeout_seconds,
            ),
        )
        device = (devices or {}).get(rank) or open_device("cpu")
        if is_staged:
            device.landing = lambda *_: None  # as of memory that storage cannot read into
        if out_by_rank is not None:
            load_arguments["out"] = out_by_rank[rank]
        sessions.append(NodeSession(place))
        try:
            load = RankLoad(
                plan.rank_plan(rank),
                storage,
                device,
                sessions[-1],
                concurrency=concurrency,
                memory_limit=memory_limit,
                **load_arguments,
            )
        except BaseException:
            for session in sessions:
                session.close()
            raise
        loads.append(load)
    return Running(plan, sessions, loads, storages)


def _possessions() -> tuple[Counter[str], set[threading.Thread], set[str]]:
    """What a load could leave behind: descriptors by what they lead to, threads, mappings of arenas."""
    return Counter(descriptors()), set(package_threads()), set(mappings_of("ray_streamer-arena"))


def _expect_slices(plan: ReadPlan, tensors_by_rank: Sequence[dict[str, torch.Tensor]]) -> None:
    """Every rank has, bit for bit, what safetensors gives."""
    for tensors, said in zip(tensors_by_rank, plan.slices, strict=True):
        expected = expected_results(Path(plan.index.uri), plan.index, said)
        assert {name: bytes_of(tensor) for name, tensor in tensors.items()} == {
            name: bytes_of(tensor) for name, tensor in expected.items()
        }


@contextmanager
def _nothing_left() -> Iterator[None]:
    gc.collect()
    before = _possessions()
    yield
    # A device's start is over before its load ends, its thread a moment later.
    for thread in threading.enumerate():
        if thread.name.startswith(("ray_streamer-cuda-start", "ray_streamer-device")):
            thread.join()
    # Without a collection: what only the garbage collector would find is left behind as long as it does not run.
    # What an earlier test had left may have gone meanwhile.
    for left, had, kind in zip(_possessions(), before, ("descriptors", "threads", "arenas"), strict=True):
        assert not left - had, f"{kind} are left"
    assert not _sockets_named(_sessions), "a socket is left"


_sessions: list[str] = []
"""All that this process had; the machine may have others."""


def _sockets_named(sessions: list[str]) -> list[str]:
    names = [
        line.split("@")[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@ray_streamer/" in line
    ]
    return [name for name in names if any(session in name for session in sessions)]


class Ranks:
    """The verbs of this file, as one fixture."""

    write = staticmethod(_write)
    index = staticmethod(_open_index)
    plan = staticmethod(_plan)
    prepare = staticmethod(_prepare)
    expect_slices = staticmethod(_expect_slices)
    nothing_left = staticmethod(_nothing_left)
    sockets_named = staticmethod(_sockets_named)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Writes checkpoints, plans, and runs every rank of a plan as a thread of this process."""
    return Ranks()


@pytest.fixture(scope="session")
def split() -> Callable[..., tuple[TensorPart, ...]]:
    """Even shares of dimension `dim` of a tensor for every rank."""
    return even_parts
