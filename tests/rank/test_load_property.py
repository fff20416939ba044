"""Random checkpoints, slices, nodes and limits: what the ranks hold is what safetensors itself gives, each byte read once.

Any of the ranks may have a CUDA device, on a runtime that moves bytes as late as it may.

The oracle is `safetensors.safe_open().get_slice()`, which reads the files on disk without any of our code; the dtypes that it
cannot slice are sliced as numpy bytes.
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
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh, Part, Replicate, Skip, Split, SplitVocabulary
from ray_streamer.sharding.residence import Residence
from ray_streamer.sharding.slices import TensorSlice
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda
from ray_streamer.testing.oracle import bytes_of, cut_by_safetensors, cut_bytes

if TYPE_CHECKING:
    from ray_streamer.device.cuda import CudaDevice

DTYPE_NAMES = ("U8", "F8_E4M3", "BF16", "F16", "F32", "I64", "F64", "C64", "F4", "F6_E2M3")
PACKED_STEP = {"F4": 2, "F6_E2M3": 4}
"""Elements of a packed dtype that fill whole bytes."""
MESHES = [
    *(Mesh(tp=tp, dp=dp) for tp in range(1, 5) for dp in (1, 1, 2)),
    *(Mesh(tp=tp, pp=2, dp=dp) for tp in (1, 2) for dp in (1, 2)),
    *(Mesh(tp=4, ep=ep) for ep in (2, 4)),
    *(Mesh(tp=2, pp=pp, dp=2, ep=ep) for pp in (1, 2) for ep in (2, 4)),
]


@dataclass(frozen=True)
class Case:
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]]
    slices: dict[str, tuple[TensorSlice | None, ...]]
    topology: Topology
    num_slots: int
    concurrency: int
    block_bytes: int
    min_run_bytes: int
    max_gap_bytes: int
    padding: int
    is_in_memory: bool
    resident_files: set[int]
    prefers_aligned: bool
    cuda_ranks: set[int]
    short_run_bytes: int
    device_scratch_bytes: int
    seed: int


@st.composite
def _placements(draw, shape: tuple[int, ...], tp: int):
    """A placement that can place `shape` on `tp` ranks."""
    dims = st.integers(0, max(0, len(shape) - 1))
    kv_heads = draw(st.integers(1, 8))
    size = shape[draw(dims)] if shape else 0
    first = size // tp // 2 * tp
    candidates = {
        "split": Split(draw(dims)),
        "vocabulary": SplitVocabulary(draw(dims)),
        "parts": Split(draw(dims), parts=(first, size - first)),
        "kv heads": Split(draw(dims), kv_heads=kv_heads),
        "kv parts": Split(draw(dims), parts=(first, Part(size - first, kv_heads=kv_heads))),
        "replicate": Replicate(),
        "skip": Skip(),
    }
    wished = candidates[draw(st.sampled_from(sorted(candidates)))]
    if wished.refusal(shape, tp) is None:
        return wished
    return candidates["vocabulary"] if shape else Replicate()


@st.composite
def _residences(draw, shape: tuple[int, ...], mesh: Mesh) -> Residence:
    """Where a layer's, an expert's or stacked experts' tensor lies, or any other."""
    stages = draw(st.none() | st.sets(st.integers(0, mesh.pp - 1), min_size=1).map(sorted).map(tuple))
    kind = draw(st.sampled_from(["any", "any", "expert", "experts"]))
    if kind == "expert":
        return Residence(stages, groups=tuple(draw(st.sets(st.integers(0, mesh.ep - 1), min_size=1))))
    if kind == "any" or not shape or not shape[0]:
        return Residence(stages)
    # Every expert is somebody's; some groups hold more of them.
    rows = [[expert for expert in range(shape[0]) if expert % mesh.ep == group] for group in range(mesh.ep)]
    more = draw(st.sets(st.integers(0, shape[0] - 1), max_size=3))
    return Residence(
        stages, experts=tuple(tuple(sorted({*group, *more}, reverse=draw(st.booleans()))) for group in rows)
    )


@st.composite
def _patterns(draw, shape: tuple[int, ...], dtype: str, mesh: Mesh) -> tuple[TensorSlice | None, ...]:
    residence = Residence() if dtype in PACKED_STEP else draw(_residences(shape, mesh))
    tp, num_ranks = residence.tp(mesh), mesh.num_ranks
    placement = Replicate() if dtype in PACKED_STEP and len(shape) < 2 else draw(_placements(shape, tp))
    if residence.refusal(placement, shape, mesh):
        placement = Replicate()
    shares = [placement.slice_of(shape, tp_index=index, tp=tp) for index in range(tp)]
    pattern = residence.pattern(shares, mesh)
    step = PACKED_STEP.get(dtype, 1)
    cuts_a_byte = any(
        value % step for part in pattern if part for box in part.boxes for value in (*box.starts[-1:], *box.stops[-1:])
    )
    if cuts_a_byte:
        pattern = tuple(SplitVocabulary(0).slice_of(shape, tp_index=rank % tp, tp=tp) for rank in range(num_ranks))
    if shape and draw(st.integers(0, 5)) == 0:
        # Nothing forbids to hold the same rows twice.
        rows = (0, shape[0] // 2) if dtype not in PACKED_STEP or len(shape) > 1 else (0, shape[0])
        pattern = (TensorSlice.parts(shape, dim=0, parts=(rows, rows)), *pattern[1:])
    # Some ranks want nothing of a tensor that others want.
    absent = draw(st.sets(st.integers(0, num_ranks - 1), max_size=2))
    return tuple(None if rank in absent else part for rank, part in enumerate(pattern))


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
    mesh = draw(st.sampled_from(MESHES))
    num_ranks = mesh.num_ranks
    order = draw(st.permutations(range(num_ranks)))
    bounds = sorted(draw(st.sets(st.integers(1, num_ranks - 1), max_size=2))) if num_ranks > 1 else []
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]] = []
    slices: dict[str, tuple[TensorSlice | None, ...]] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        tensors_by_file[-1].append((name, dtype, shape))
        slices[name] = draw(_patterns(shape, dtype, mesh))

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
        prefers_aligned=draw(st.booleans()),
        cuda_ranks=draw(st.sets(st.sampled_from(range(num_ranks)))) if draw(st.booleans()) else set(),
        short_run_bytes=draw(st.sampled_from([0, 64, 1 << 20])),
        device_scratch_bytes=draw(st.sampled_from([0, 0, 300, 1 << 14])),
        seed=draw(st.integers(0, 99)),
    )


def _check_tensors(plan, folder: Path, tensors_by_rank) -> None:
    index = plan.index
    for rank, tensors in enumerate(tensors_by_rank):
        held_by_rank = {index.names[i]: plan.slice_of(i, rank) for i in range(len(index))}
        assert tensors.keys() == {name for name, held in held_by_rank.items() if held is not None}
        for name, tensor in tensors.items():
            note(f"rank {rank}, tensor {name}")
            position, held = index.position(name), held_by_rank[name]
            dtype, path = index.dtype_of(position), folder / index.files[index.file_ids[position]].path
            assert tensor.is_contiguous()
            assert tensor.dtype == getattr(torch, dtype.torch_name)
            if dtype.is_packed:
                extent = index.extent_of(position)
                data = path.read_bytes()[extent.start : extent.stop]
                assert tuple(tensor.shape) == dtype.torch_shape(held.shape)
                assert bytes_of(tensor) == cut_bytes(data, dtype.name, index.shape_of(position), held)
            else:
                expected = cut_by_safetensors(path, name, held)
                assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
                assert bytes_of(tensor) == bytes_of(expected)


def _wanted(plan, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """For each file one claim per byte: does a rank of this node want it?"""
    index = plan.index
    wanted = [np.zeros(file.size_bytes, dtype=bool) for file in index.files]
    for tensor in range(len(index)):
        num_bits, shape, extent = index.dtype_of(tensor).num_bits, index.shape_of(tensor), index.extent_of(tensor)
        bits = np.zeros((*shape, num_bits), dtype=bool)
        for rank in ranks:
            held = plan.slice_of(tensor, rank)
            for box in held.boxes if held else ():
                bits[tuple(map(slice, box.starts, box.stops))] = True
        wanted[index.file_ids[tensor]][extent.start : extent.stop] = bits.reshape(-1, 8).any(axis=1)
    return wanted


def _check_reads(plan, storages, case: Case) -> None:
    for node, ranks in enumerate(plan.topology.nodes):
        node_plan = plan.node_plans[plan.node_plan_ids[node]]
        paths = [file.path for file in plan.index.files]
        reads = [read for rank in ranks for read in storages[rank].reads]
        # A GPU prefers staged memory, and the node's first rank decides.
        viewed_files = set() if ranks[0] in case.cuda_ranks else case.resident_files
        rows = [row for row in node_plan.blocks.to_pylist() if row["file"] not in viewed_files]
        planned = [(paths[row["file"]], row["start"], row["stop"]) for row in rows]
        assert Counter((path, extent.start, extent.stop) for path, extent in reads) == Counter(planned)
        assert all(extent.num_bytes <= case.block_bytes for _, extent in reads)
        num_reads = [np.zeros(file.size_bytes, dtype=int) for file in plan.index.files]
        for path, extent in reads:
            num_reads[paths.index(path)][extent.start : extent.stop] += 1
        for file, (file_reads, file_wanted) in enumerate(zip(num_reads, _wanted(plan, ranks), strict=True)):
            if file in viewed_files:
                assert not file_reads.any()
                continue
            assert (file_reads <= 1).all()
            assert (file_reads[file_wanted] == 1).all()
            if case.min_run_bytes == case.max_gap_bytes == 0:
                assert (file_reads == file_wanted).all(), "amplification is not 1"


def _check_statistics(running, memory_limit: int) -> None:
    for load, storage in zip(running.loads, running.storages, strict=True):
        statistics = load.statistics()
        assert statistics.peak_staging_bytes <= memory_limit
        assert statistics.bytes_delivered == statistics.bytes_to_deliver
        assert statistics.bytes_read == sum(extent.num_bytes for _, extent in storage.reads)
        assert statistics.num_requests == len(storage.reads)
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


@settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
                prefers_aligned=case.prefers_aligned,
            )
            tensors = running.start().tensors()
        _check_tensors(plan, folder, tensors)
        _check_reads(plan, running.storages, case)
        _check_statistics(running, memory_limit)
        _check_devices(libraries)
