"""Random moves of several ranks, between random checkpoints and memories in any strides: the results are those of torch's own `copy_`.

Strided, transposed, permuted, repeated and overlapping sources, several into one result and one into several, holes, scalars,
other dtypes; blocks tear elements, since the files' data begin at odd places and blocks are small.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ray_streamer.dtypes import dtype_named
from ray_streamer.planning.topology import Topology
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.slices.move import row_major
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda

SOURCE_DTYPES = ("BF16", "F16", "F32", "F64", "I64", "U8", "F8_E4M3", "C64")
CASTS = ("BF16", "F16", "F32", "F64")
LARGEST = 3000


@dataclass(frozen=True)
class View:
    """A strided view, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def side(self) -> Side:
        return Side(self.offset, self.strides)

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.as_strided(self.shape, self.strides, memory.storage_offset() + self.offset)


@dataclass(frozen=True)
class Case:
    tensors: list[tuple[str, str, tuple[int, ...]]]
    specs: list[list[ResultSpec]]
    rows: list[list[tuple[str, str, list[Move]]]]
    given: list[set[str]]
    padding: int
    min_run_bytes: int
    resident: bool
    cuda_ranks: set[int]


@st.composite
def memories(draw):
    """Shape and strides of a result: contiguous, permuted, padded, or stepping over elements that are not its own."""
    shape = tuple(draw(st.lists(st.integers(1, 12), max_size=4)))
    if draw(st.integers(0, 3)) == 0:
        shape = (*shape, draw(st.sampled_from([40, 96, 256])))
    while torch.Size(shape).numel() > LARGEST:
        shape = shape[1:]
    if draw(st.integers(0, 2)) == 0:
        return shape, None
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), draw(st.integers(1, 2))
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim] + draw(st.integers(0, 1))
    return shape, tuple(strides)


@st.composite
def disjoint_views(draw, whole: View):
    """Some disjoint views of a memory, in no order; what is between them is a hole."""
    views = [whole]
    for _ in range(draw(st.integers(0, 4))):
        view = views.pop(draw(st.integers(0, len(views) - 1)))
        if not view.shape:
            views.append(view)
            continue
        dim = draw(st.integers(0, len(view.shape) - 1))
        size, stride = view.shape[dim], view.strides[dim]
        if draw(st.booleans()):
            at = draw(st.integers(0, size))
            parts = [(0, at, 1), (at, size - at, 1)]
        else:
            every = draw(st.integers(2, 3))
            parts = [(first, len(range(first, size, every)), every) for first in range(every)]
        for first, count, every in parts:
            shape = (*view.shape[:dim], count, *view.shape[dim + 1 :])
            strides = (*view.strides[:dim], stride * every, *view.strides[dim + 1 :])
            views.append(View(view.offset + first * stride, shape, strides))
    kept = draw(st.lists(st.booleans(), min_size=len(views), max_size=len(views)))
    return [view for view, is_kept in zip(views, kept, strict=True) if is_kept or draw(st.booleans())]


@st.composite
def sources(draw, shape: tuple[int, ...]):
    """A view of `shape` of some tensor, and how many elements that must have."""
    kind = draw(st.sampled_from(["dense", "dense", "permuted", "permuted", "spaced", "repeated", "overlapping"]))
    order = list(range(len(shape)))
    if kind != "dense":
        order = draw(st.permutations(order))
    strides, step = [0] * len(shape), draw(st.integers(1, 3)) if kind == "spaced" else 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1) + (draw(st.integers(0, 2)) if kind == "spaced" else 0)
    if shape and kind == "repeated":
        strides[draw(st.integers(0, len(shape) - 1))] = 0
    if shape and kind == "overlapping":
        strides = [draw(st.integers(0, 5)) for _ in shape]
    view = View(draw(st.integers(0, 7)), shape, tuple(strides))
    return view, view.side.span(shape)[1]


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.integers(1, 3))
    needed: dict[str, tuple[str, int]] = {}
    specs, rows, given = [], [], []
    for rank in range(num_ranks):
        specs.append([])
        rows.append([])
        for number in range(draw(st.integers(0, 4))):
            shape, strides = draw(memories())
            stored = draw(st.sampled_from(SOURCE_DTYPES))
            dtype = draw(st.sampled_from([stored, *CASTS])) if stored in CASTS else stored
            name = f"r{number}"
            is_zeroed = draw(st.booleans())
            specs[rank].append(ResultSpec(name=name, dtype=dtype, shape=shape, strides=strides, zeroes_holes=is_zeroed))
            whole = View(0, shape, row_major(shape) if strides is None else strides)
            moves: dict[str, list[Move]] = {}
            for target in draw(disjoint_views(whole)):
                order = draw(st.permutations(range(len(target.shape))))
                target = View(target.offset, *(tuple(of[at] for at in order) for of in (target.shape, target.strides)))
                source, num_elements = draw(sources(target.shape))
                tensor = f"t{draw(st.integers(0, 2))}.{stored}"
                needed[tensor] = (stored, max(num_elements, needed.get(tensor, ("", 0))[1]))
                moves.setdefault(tensor, []).append(Move(target.shape, source.side, target.side))
            rows[rank].extend((tensor, name, listed) for tensor, listed in moves.items())
        given.append(draw(st.sets(st.sampled_from([spec.name for spec in specs[rank]]))) if specs[rank] else set())
    return Case(
        tensors=[(name, dtype, (size,)) for name, (dtype, size) in needed.items()],
        specs=specs,
        rows=rows,
        given=given,
        padding=draw(st.integers(0, 9)),
        min_run_bytes=draw(st.sampled_from([0, 64, 1 << 18])),
        resident=draw(st.booleans()),
        cuda_ranks=draw(st.sets(st.integers(0, num_ranks - 1))) if draw(st.integers(0, 2)) == 0 else set(),
    )


def memory_of(spec: ResultSpec, seed: int) -> torch.Tensor:
    """A tensor as the spec wants it, between other memory, of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    width = dtype_named(spec.dtype).num_bits // 8
    num_bytes = (spec.num_storage_elements + 6) * width
    storage = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    dtype = getattr(torch, dtype_named(spec.dtype).torch_name)
    return storage.view(dtype).as_strided(spec.shape, spec.memory_strides, 3)


def expected_of(spec: ResultSpec, given: torch.Tensor | None, moves, checkpoint) -> torch.Tensor:
    """What torch makes of a result's moves, one after the other, in a copy of the memory that was there."""
    memory = memory_of(spec, 0)
    if given is not None:
        memory.untyped_storage().copy_(given.untyped_storage())
    if spec.zeroes_holes:
        memory.zero_()
    for tensor, move in moves:
        source = View(move.source.offset, move.shape, move.source.strides).of(checkpoint[tensor])
        target_of(move).of(memory).copy_(source)
    return memory


def memory_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a copy of all its storage."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def target_of(move: Move) -> View:
    return View(move.target.offset, move.shape, move.target.strides)


def checkpoint_of(index, data: bytes) -> dict[str, torch.Tensor]:
    """Every tensor of a file, by torch alone."""
    found = {}
    for position, name in enumerate(index.names):
        extent, dtype = index.extent_of(position), getattr(torch, index.dtype_of(position).torch_name)
        # Some room behind, so that views without elements may begin anywhere.
        found[name] = torch.frombuffer(
            bytearray(data[extent.start : extent.stop] + bytes(512)), dtype=torch.uint8
        ).view(dtype)
    return found


def check_results(case: Case, rank: int, held, out, before, checkpoint) -> None:
    assert list(held) == [spec.name for spec in case.specs[rank]]
    for spec in case.specs[rank]:
        moves = [(tensor, move) for tensor, name, listed in case.rows[rank] if name == spec.name for move in listed]
        is_cast = any(not tensor.endswith(f".{spec.dtype}") for tensor, _ in moves)
        got, expected = held[spec.name], expected_of(spec, before.get(spec.name), moves, checkpoint)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if spec.name in out:
            assert got is out[spec.name]
            storages = [raw(whole_storage(tensor), is_cast=is_cast) for tensor in (got, expected)]
            assert storages[0] == storages[1], f"rank {rank}, {spec.name}: what lies between"
        # Nobody knows what our own memory holds where nothing lands and nothing is zeroed.
        is_known = spec.name in out or spec.zeroes_holes
        for view in [View(0, spec.shape, spec.memory_strides)] if is_known else [target_of(move) for _, move in moves]:
            seen = [raw(view.of(tensor), is_cast=is_cast) for tensor in (got, expected)]
            assert seen[0] == seen[1], f"rank {rank}, {spec.name}, {view}"


def raw(tensor: torch.Tensor, *, is_cast: bool) -> bytes:
    """Bytes of a tensor; of what is cast, numbers: torch makes one not-a-number of another, as its loops run."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor)
    return bytes((flat.masked_fill(flat.isnan(), 0) if is_cast else flat).untyped_storage())


@given(case=cases())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_results_are_what_torch_copies(ranks, case):
    note(case)
    out = [
        {spec.name: memory_of(spec, rank) for spec in specs if spec.strides is not None or spec.name in given}
        for rank, (specs, given) in enumerate(zip(case.specs, case.given, strict=True))
    ]
    before = [{name: memory_copy(tensor) for name, tensor in tensors.items()} for tensors in out]
    with tempfile.TemporaryDirectory() as temporary:
        folder = ranks.write(Path(temporary), [case.tensors], padding=case.padding)
        plan = ranks.plan(
            str(folder),
            [RankSlices.from_rows(ranks.index(str(folder)), *said) for said in zip(case.specs, case.rows, strict=True)],
            topology=Topology.even(len(case.specs)),
            block_bytes=4096,
            min_run_bytes=case.min_run_bytes,
        )
        with ranks.nothing_left():
            running = ranks.prepare(
                plan,
                memory_limit=8192,
                resident_paths=["00000.safetensors"] if case.resident else [],
                out_by_rank=out,
                devices={rank: open_fake_cuda(FakeCuda()) for rank in case.cuda_ranks},
            )
            tensors = running.start().tensors()
        checkpoint = checkpoint_of(plan.index, (folder / "00000.safetensors").read_bytes())
    for rank, held in enumerate(tensors):
        check_results(case, rank, held, out[rank], before[rank], checkpoint)
    node_plan = plan.node_plans[0]
    if not case.min_run_bytes:
        assert node_plan.read_bytes == node_plan.needed_bytes
    for load in running.loads:
        statistics = load.statistics()
        assert statistics.bytes_delivered == statistics.bytes_to_deliver
