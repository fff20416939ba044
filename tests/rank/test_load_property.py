"""Random checkpoints, slices, nodes and limits: what the ranks hold is what safetensors itself gives, each byte read once.

Any of the ranks may have a CUDA device, on a runtime that moves bytes as late as it may.

The oracle is what safetensors reads of the files on disk without any of our code, cut and copied by torch.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ray_streamer.planning.topology import Topology
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda
from ray_streamer.testing.oracle import bytes_of, expected_results
from ray_streamer.testing.parts import TensorPart, even_parts

if TYPE_CHECKING:
    from ray_streamer.device.cuda import CudaDevice
    from ray_streamer.extent import Extent

DTYPE_NAMES = ("U8", "F8_E4M3", "BF16", "F16", "F32", "I64", "F64", "C64", "F4", "F6_E2M3")
PACKED_STEP = {"F4": 2, "F6_E2M3": 4}
"""Elements of a packed dtype that fill whole bytes."""


@dataclass(frozen=True)
class Case:
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]]
    slices: dict[str, tuple[TensorPart | None, ...]]
    topology: Topology
    num_slots: int
    concurrency: int
    block_bytes: int
    min_run_bytes: int
    max_gap_bytes: int
    padding: int
    is_in_memory: bool
    resident_files: set[int]
    is_staged: bool
    cuda_ranks: set[int]
    short_run_bytes: int
    device_scratch_bytes: int
    seed: int

    def viewed_files(self, ranks) -> set[int]:
        """Files of which every rank of a node takes its own part; a GPU prefers staged memory, and the first rank decides."""
        return set() if ranks[0] in self.cuda_ranks else self.resident_files

    def planned_reads(self, plan, ranks, storage) -> list[tuple[str, Extent]]:
        """Reads of a rank of a node, but for those of its own part of files in the page cache."""
        viewed_files = self.viewed_files(ranks)
        viewed = {file.path for number, file in enumerate(plan.index.files) if number in viewed_files}
        return [read for read in storage.reads if read[0] not in viewed]


@st.composite
def _ranges(draw, size: int) -> tuple[tuple[int, int], ...]:
    """Some ranges of a dimension, in any order; they may overlap, since nothing forbids to hold rows twice."""
    bounds = st.integers(0, size)
    pairs = draw(st.lists(st.tuples(bounds, bounds).map(sorted).map(tuple), min_size=1, max_size=3))
    return tuple((start, stop) for start, stop in pairs)


@st.composite
def _parts(draw, shape: tuple[int, ...], dtype: str, num_ranks: int) -> tuple[TensorPart | None, ...]:
    """What each rank holds: all, an even share of some dimension, or ranges of its own."""
    # Shares of a packed dtype must lie on whole bytes, and so must what lies between them.
    dims = range(max(1, len(shape) - 1)) if dtype in PACKED_STEP else range(len(shape))
    kind = draw(st.sampled_from(["whole", "shares", "shares", "ranges"])) if shape else "whole"
    if kind == "whole" or (dtype in PACKED_STEP and len(shape) < 2):
        held = [TensorPart.whole(shape)] * num_ranks
    elif kind == "shares":
        held = list(even_parts(shape, num_ranks, dim=draw(st.sampled_from(dims))))
    else:
        dim = draw(st.sampled_from(dims))
        held = [TensorPart.ranges(shape, dim=dim, ranges=draw(_ranges(shape[dim]))) for _ in range(num_ranks)]
    # Some ranks want nothing of a tensor that others want.
    absent = draw(st.sets(st.integers(0, num_ranks - 1), max_size=2))
    return tuple(None if rank in absent else part for rank, part in enumerate(held))


@st.composite
def _shapes(draw, dtype: str) -> tuple[int, ...]:
    num_dims = draw(st.integers(1 if dtype in PACKED_STEP else 0, 4))
    most = {0: 1, 1: 3000, 2: 70, 3: 18, 4: 8}[num_dims]
    shape = [draw(st.integers(0, most)) for _ in range(num_dims)]
    if dtype in PACKED_STEP:
        shape[-1] *= PACKED_STEP[dtype]
    return tuple(shape)


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.integers(1, 8))
    order = draw(st.permutations(range(num_ranks)))
    bounds = sorted(draw(st.sets(st.integers(1, num_ranks - 1), max_size=2))) if num_ranks > 1 else []
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]] = []
    slices: dict[str, tuple[TensorPart | None, ...]] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        tensors_by_file[-1].append((name, dtype, shape))
        slices[name] = draw(_parts(shape, dtype, num_ranks))

    for file in range(draw(st.integers(1, 3))):
        tensors_by_file.append([])
        for number in range(draw(st.integers(1, 4))):
            dtype = draw(st.sampled_from(DTYPE_NAMES))
            add(f"{file}.{number}", dtype, draw(_shapes(dtype)))
    if draw(st.booleans()):
        # Larger than all slots of all ranks together.
        add("large", "BF16", (draw(st.integers(200, 260)), draw(st.sampled_from([96, 128, 251]))))
    return Case(
        tensors_by_file,
        slices,
        Topology(tuple(tuple(order[a:b]) for a, b in pairwise([0, *bounds, num_ranks]))),
        num_slots=draw(st.sampled_from([1, 1, 2, 5])),
        concurrency=draw(st.integers(1, 8)),
        block_bytes=4096 * draw(st.sampled_from([1, 1, 2, 4])),
        min_run_bytes=draw(st.sampled_from([0, 0, 64, 4096])),
        max_gap_bytes=draw(st.sampled_from([0, 0, 100, 5000])),
        padding=draw(st.integers(0, 9)),
        is_in_memory=draw(st.booleans()),
        resident_files=draw(st.sets(st.integers(0, 2), max_size=1)),
        is_staged=draw(st.booleans()),
        cuda_ranks=draw(st.sets(st.sampled_from(range(num_ranks)))) if draw(st.booleans()) else set(),
        short_run_bytes=draw(st.sampled_from([0, 64, 1 << 20])),
        device_scratch_bytes=draw(st.sampled_from([0, 0, 300, 1 << 14])),
        seed=draw(st.integers(0, 99)),
    )


def _check_tensors(plan, folder: Path, tensors_by_rank) -> None:
    for rank, tensors in enumerate(tensors_by_rank):
        expected = expected_results(folder, plan.index, plan.slices[rank])
        assert list(tensors) == list(expected)
        for name, tensor in tensors.items():
            note(f"rank {rank}, tensor {name}")
            assert tensor.is_contiguous()
            assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
            assert bytes_of(tensor) == bytes_of(expected[name])


def _wanted(plan, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """For each file one claim per byte: does a rank of this node want it?"""
    index = plan.index
    wanted = [np.zeros(file.size_bytes, dtype=bool) for file in index.files]
    for tensor in range(len(index)):
        num_bits, shape, extent = index.dtype_of(tensor).num_bits, index.shape_of(tensor), index.extent_of(tensor)
        bits = np.zeros((int(np.prod(shape)), num_bits), dtype=bool)
        for said in (plan.slices[rank] for rank in ranks):
            for row in np.flatnonzero(said.tensor_ids == tensor):
                for move in said.patterns[said.pattern_ids[row]]:
                    strides = [step * num_bits for step in move.source.strides]
                    if move.num_elements:
                        first = move.source.offset * num_bits
                        np.ndarray((*move.shape, num_bits), bool, bits.reshape(-1), first, (*strides, 1))[...] = True
        wanted[index.file_ids[tensor]][extent.start : extent.stop] = bits.reshape(-1, 8).any(axis=1)
    return wanted


def _check_reads(plan, storages, case: Case) -> None:
    for node, ranks in enumerate(plan.topology.nodes):
        node_plan = plan.node_plans[plan.node_plan_ids[node]]
        paths = [file.path for file in plan.index.files]
        viewed_files = case.viewed_files(ranks)
        reads = [read for rank in ranks for read in case.planned_reads(plan, ranks, storages[rank])]
        blocks = node_plan.blocks
        rows = zip(blocks.file_ids.tolist(), blocks.starts.tolist(), blocks.stops.tolist(), strict=True)
        planned = [(paths[file], start, stop) for file, start, stop in rows if file not in viewed_files]
        assert Counter((path, extent.start, extent.stop) for path, extent in reads) == Counter(planned)
        assert all(extent.num_bytes <= case.block_bytes for _, extent in reads)
        num_reads = [np.zeros(file.size_bytes, dtype=int) for file in plan.index.files]
        for path, extent in reads:
            num_reads[paths.index(path)][extent.start : extent.stop] += 1
        for file, (file_reads, file_wanted) in enumerate(zip(num_reads, _wanted(plan, ranks), strict=True)):
            if file in viewed_files:
                continue
            assert (file_reads <= 1).all()
            assert (file_reads[file_wanted] == 1).all()
            if case.min_run_bytes == case.max_gap_bytes == 0:
                assert (file_reads == file_wanted).all(), "amplification is not 1"


def _check_statistics(plan, running, case: Case, memory_limit: int) -> None:
    nodes = {rank: ranks for ranks in plan.topology.nodes for rank in ranks}
    for rank, (load, storage) in enumerate(zip(running.loads, running.storages, strict=True)):
        statistics = load.statistics()
        reads = case.planned_reads(plan, nodes[rank], storage)
        assert statistics.peak_staging_bytes <= memory_limit
        assert statistics.bytes_delivered == statistics.bytes_to_deliver
        assert statistics.bytes_read == sum(extent.num_bytes for _, extent in reads)
        assert statistics.num_requests == len(reads)
        assert statistics.direct_bytes <= statistics.bytes_read


def _cuda_devices(case: Case) -> tuple[dict[int, CudaDevice], list[FakeCuda]]:
    libraries = {rank: FakeCuda(random=Random(case.seed + rank)) for rank in sorted(case.cuda_ranks)}
    devices = {
        rank: open_fake_cuda(
            library, short_run_bytes=case.short_run_bytes, device_scratch_bytes=case.device_scratch_bytes
        )
        for rank, library in libraries.items()
    }
    return devices, list(libraries.values())


def _check_devices(libraries: list[FakeCuda]) -> None:
    for library in libraries:
        assert not library.faults
        assert not library.locked
        assert not library.num_pending


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_every_rank_holds_what_safetensors_gives(case, ranks):
    with tempfile.TemporaryDirectory() as temporary:
        folder = ranks.write(Path(temporary), case.tensors_by_file, padding=case.padding)
        uri = str(folder)
        if case.is_in_memory:
            uri = "memory://load-property"
            MemoryStorage.remove(uri)
            MemoryStorage.put(uri, {path.name: path.read_bytes() for path in folder.iterdir()})
        plan = ranks.plan(
            uri,
            case.slices,
            topology=case.topology,
            block_bytes=case.block_bytes,
            min_run_bytes=case.min_run_bytes,
            max_gap_bytes=case.max_gap_bytes,
        )
        memory_limit = case.num_slots * case.block_bytes
        with ranks.nothing_left():
            devices, libraries = _cuda_devices(case)
            running = ranks.prepare(
                plan,
                devices=devices,
                memory_limit=memory_limit,
                concurrency=case.concurrency,
                resident_paths={file.path for n, file in enumerate(plan.index.files) if n in case.resident_files},
                is_staged=case.is_staged,
            )
            tensors = running.start().tensors()
        _check_tensors(plan, folder, tensors)
        _check_reads(plan, running.storages, case)
        _check_statistics(plan, running, case, memory_limit)
        _check_devices(libraries)
