"""Random checkpoints, slices, topologies and limits: a plan delivers every wanted byte exactly once and reads no more than it says.

The oracle slices numpy arrays with the boxes' own starts and stops; it shares no code with the planner.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ray_streamer.dtypes import dtype_named
from ray_streamer.planning.assign import assign_readers
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding.slices import Box, SliceTable, TensorSlice

DTYPE_NAMES = ("U8", "F8_E4M3", "BF16", "F32", "I64", "F4")
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

Segments = tuple[tuple[int, int], ...]
"""Half-open index ranges of one dimension, in the order in which they lie in the result."""


@dataclass(frozen=True)
class Case:
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]]
    slices: dict[str, tuple[TensorSlice | None, ...]]
    topology: Topology
    limits: ReadLimits
    padding: int


def _lattice(segments_by_dim: list[Segments]) -> TensorSlice:
    """Every combination of one segment per dimension, laid out in the same order in the result."""
    placed = []
    for segments in segments_by_dim:
        lands = np.cumsum([0, *(stop - start for start, stop in segments)]).tolist()
        placed.append([(start, stop, land) for (start, stop), land in zip(segments, lands, strict=False)])
    boxes = tuple(
        Box(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts))
        for parts in product(*placed)
    )
    return TensorSlice(tuple(sum(stop - start for start, stop in segments) for segments in segments_by_dim), boxes)


def _stacked(shape: tuple[int, ...], dim: int, step: int) -> TensorSlice:
    """The two halves of the last dimension, one behind the other along `dim`; the whole tensor where that cannot be."""
    half = shape[-1] // 2
    if dim == len(shape) - 1 or shape[-1] % 2 or half % step:
        return TensorSlice.whole(shape)
    boxes = tuple(
        Box(
            starts=(*(0 for _ in shape[:-1]), side * half),
            stops=(*shape[:-1], (side + 1) * half),
            lands=tuple(side * shape[dim] if axis == dim else 0 for axis in range(len(shape))),
        )
        for side in range(2)
    )
    sizes = [*shape[:-1], half]
    sizes[dim] *= 2
    return TensorSlice(tuple(sizes), boxes)


@st.composite
def _segments(draw, size: int, step: int) -> Segments:
    cuts = draw(st.lists(st.integers(0, size // step), max_size=3))
    bounds = sorted({0, size, *(cut * step for cut in cuts)})
    ranges = list(pairwise(bounds))
    return tuple(draw(st.permutations(ranges))[: draw(st.integers(0, len(ranges)))])


def _share(size: int, rank: int, num_ranks: int, step: int) -> tuple[int, int]:
    """Rank's part of an uneven split into chunks of ceil(size / num_ranks): the last ranks may hold nothing."""
    chunk = -(-size // step // num_ranks) * step
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


@st.composite
def _pattern(draw, shape: tuple[int, ...], num_ranks: int, is_packed: bool) -> tuple[TensorSlice | None, ...]:
    steps = [2 if is_packed and dim == len(shape) - 1 else 1 for dim in range(len(shape))]
    kind = draw(st.sampled_from(["split", "split", "fused", "lattice", "stacked", "replicated", "nobody"]))
    if kind == "nobody":
        return (None,) * num_ranks
    if kind == "replicated" or not shape:
        return (TensorSlice.whole(shape),) * num_ranks
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "split":
        shares = [_share(shape[dim], rank, num_ranks, steps[dim]) for rank in range(num_ranks)]
        return tuple(TensorSlice.along(shape, dim=dim, start=start, stop=stop) for start, stop in shares)
    if kind == "fused":
        middle = shape[dim] // steps[dim] // 3 * steps[dim]
        first = [_share(middle, rank, num_ranks, steps[dim]) for rank in range(num_ranks)]
        second = [_share(shape[dim] - middle, rank, num_ranks, steps[dim]) for rank in range(num_ranks)]
        return tuple(
            TensorSlice.parts(shape, dim=dim, parts=((a, b), (c + middle, d + middle)))
            for (a, b), (c, d) in zip(first, second, strict=True)
        )
    if kind == "stacked":
        return tuple(_stacked(shape, dim, steps[-1]) if draw(st.booleans()) else None for _ in range(num_ranks))
    return tuple(
        _lattice([draw(_segments(size, step)) for size, step in zip(shape, steps, strict=True)])
        if draw(st.booleans())
        else None
        for _ in range(num_ranks)
    )


@st.composite
def _shape(draw, is_packed: bool) -> tuple[int, ...]:
    num_dims = draw(st.integers(1 if is_packed else 0, 4))
    most = {0: 1, 1: 20000, 2: 120, 3: 20, 4: 9}[num_dims]
    shape = [draw(st.integers(0, most)) for _ in range(num_dims)]
    if is_packed:
        shape[-1] *= 2
    return tuple(shape)


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.integers(1, 6))
    order = draw(st.permutations(range(num_ranks)))
    bounds = sorted(draw(st.sets(st.integers(1, num_ranks - 1), max_size=3))) if num_ranks > 1 else []
    topology = Topology(tuple(tuple(order[a:b]) for a, b in pairwise([0, *bounds, num_ranks])))
    limits = ReadLimits(
        block_bytes=4096 * draw(st.integers(1, 4)),
        min_run_bytes=draw(st.sampled_from([0, 1, 16, 200, 4096, 1 << 20])),
        max_gap_bytes=draw(st.sampled_from([0, 1, 100, 3000, 1 << 62])),
    )
    tensors_by_file: list[list[tuple[str, str, tuple[int, ...]]]] = []
    slices: dict[str, tuple[TensorSlice | None, ...]] = {}
    for file in range(draw(st.integers(1, 3))):
        tensors_by_file.append([])
        for number in range(draw(st.integers(0, 5))):
            dtype = draw(st.sampled_from(DTYPE_NAMES))
            shape = draw(_shape(dtype == "F4"))
            tensors_by_file[-1].append((f"{file}.{number}", dtype, shape))
            slices[f"{file}.{number}"] = draw(_pattern(shape, num_ranks, dtype == "F4"))
    return Case(tensors_by_file, slices, topology, limits, draw(st.integers(0, 7)))


def _elements(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor with one more dimension: the bytes of an element, or the one nibble of a packed one."""
    array = np.frombuffer(data, np.uint8)
    if dtype == "F4":
        return np.stack([array & 15, array >> 4], axis=-1).reshape(*shape, 1)
    return array.reshape(*shape, dtype_named(dtype).num_bits // 8)


def _expected(data: bytes, dtype: str, shape: tuple[int, ...], held: TensorSlice) -> bytes:
    elements = _elements(data, dtype, shape)
    result = np.zeros((*held.shape, elements.shape[-1]), np.uint8)
    for box in held.boxes:
        target = tuple(slice(land, land + size) for land, size in zip(box.lands, box.shape, strict=True))
        result[target] = elements[tuple(map(slice, box.starts, box.stops))]
    flat = result.ravel()
    return (flat[0::2] | flat[1::2] << 4).tobytes() if dtype == "F4" else flat.tobytes()


def _wanted_bytes(checkpoint, slices: SliceTable, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """For each file one claim per byte: does a rank of this node want it?"""
    index = checkpoint.index
    wanted = [np.zeros(len(data), dtype=bool) for data in checkpoint.contents]
    for tensor, rank in product(range(len(index)), ranks):
        held = slices.slice_of(tensor, rank)
        if held is None:
            continue
        dtype, shape = index.dtype_of(tensor), index.shape_of(tensor)
        mark = np.zeros((*shape, max(1, dtype.num_bits // 8)), dtype=bool)
        for box in held.boxes:
            mark[tuple(map(slice, box.starts, box.stops))] = True
        flat = mark.ravel()[::2] if dtype.name == "F4" else mark.ravel()
        extent = index.extent_of(tensor)
        wanted[index.file_ids[tensor]][extent.start : extent.stop] |= flat
    return wanted


@SETTINGS
@given(case=cases())
def test_every_wanted_byte_is_delivered_exactly_once(case, make_checkpoint, execute):
    checkpoint = make_checkpoint(case.tensors_by_file, padding=case.padding)
    index = checkpoint.index
    slices = SliceTable.from_slices(index, case.slices, num_ranks=case.topology.num_ranks)
    plan = plan_reads(index, slices, case.topology, case.limits)
    for (rank, tensor), delivery in execute(plan, checkpoint.contents).items():
        note(f"rank {rank}, tensor {index.names[tensor]}")
        assert (delivery.num_writes == 1).all()
        held = slices.slice_of(tensor, rank)
        assert held is not None
        expected = _expected(checkpoint.tensor_bytes(tensor), index.dtype_of(tensor).name, index.shape_of(tensor), held)
        assert delivery.data.tobytes() == expected


@SETTINGS
@given(case=cases())
def test_blocks_keep_to_their_grid_file_and_takers(case, make_checkpoint, nodes_of):
    checkpoint = make_checkpoint(case.tensors_by_file, padding=case.padding)
    index = checkpoint.index
    slices = SliceTable.from_slices(index, case.slices, num_ranks=case.topology.num_ranks)
    plan = plan_reads(index, slices, case.topology, case.limits)
    data_starts = [
        min(index.starts[index.file_ids == file].tolist(), default=0) for file in range(len(checkpoint.contents))
    ]
    for ranks, node_plan in nodes_of(plan):
        blocks = node_plan.blocks.to_pylist()
        takers: list[set[int]] = [set() for _ in blocks]
        for piece in node_plan.pieces.to_pylist():
            takers[piece["block"]].add(piece["rank"])
        wanted = _wanted_bytes(checkpoint, slices, ranks)
        is_read = [np.zeros(len(data), dtype=bool) for data in checkpoint.contents]
        for block, block_takers in zip(blocks, takers, strict=True):
            assert data_starts[block["file"]] <= block["start"] < block["stop"] <= index.files[block["file"]].size_bytes
            assert block["start"] // case.limits.block_bytes == (block["stop"] - 1) // case.limits.block_bytes
            assert block["reader"] in block_takers
            assert block["num_takers"] == len(block_takers)
            assert wanted[block["file"]][block["start"] : block["stop"]].any(), "a block holds nothing but a gap"
            is_read[block["file"]][block["start"] : block["stop"]] = True
        places = [(block["file"], block["start"], block["stop"]) for block in blocks]
        assert all((file, stop) <= (next_file, start) for (file, _, stop), (next_file, start, _) in pairwise(places))
        assert all((have | ~want).all() for have, want in zip(is_read, wanted, strict=True))
        assert node_plan.needed_bytes == sum(int(want.sum()) for want in wanted)
        assert node_plan.read_bytes == sum(int(have.sum()) for have in is_read)


@SETTINGS
@given(case=cases())
def test_exact_reads_read_nothing_twice_and_nothing_unwanted(case, make_checkpoint, nodes_of):
    checkpoint = make_checkpoint(case.tensors_by_file, padding=case.padding)
    slices = SliceTable.from_slices(checkpoint.index, case.slices, num_ranks=case.topology.num_ranks)
    limits = replace(case.limits, min_run_bytes=0, max_gap_bytes=0)
    plan = plan_reads(checkpoint.index, slices, case.topology, limits)
    for _, node_plan in nodes_of(plan):
        assert node_plan.read_bytes == node_plan.needed_bytes


@st.composite
def _orders(draw, tensors: list[tuple[str, str, tuple[int, ...]]]) -> list[int]:
    """Any order of a header's entries, but tensors without bytes, which may share one place, keep theirs."""
    order = draw(st.permutations(range(len(tensors))))
    without_bytes = [position for position in range(len(tensors)) if 0 in tensors[position][2]]
    following = iter(without_bytes)
    return [next(following) if position in without_bytes else position for position in order]


@SETTINGS
@given(case=cases(), data=st.data())
def test_order_of_the_input_does_not_matter(case, data, make_checkpoint):
    checkpoint = make_checkpoint(case.tensors_by_file, padding=case.padding)
    orders = [data.draw(_orders(tensors)) for tensors in case.tensors_by_file]
    permuted = make_checkpoint(case.tensors_by_file, orders=orders, padding=case.padding)
    backwards = dict(reversed(list(case.slices.items())))
    plans = [
        plan_reads(
            source.index,
            SliceTable.from_slices(source.index, named, num_ranks=case.topology.num_ranks),
            case.topology,
            case.limits,
        )
        for source, named in ((checkpoint, case.slices), (permuted, backwards))
    ]
    assert plans[0].plan_hash == plans[1].plan_hash
    for ours, theirs in zip(plans[0].node_plans, plans[1].node_plans, strict=True):
        assert ours.blocks.equals(theirs.blocks)
        assert ours.pieces.equals(theirs.pieces)


@SETTINGS
@given(case=cases())
def test_a_plan_travels_without_change(case, make_checkpoint):
    checkpoint = make_checkpoint(case.tensors_by_file, padding=case.padding)
    slices = SliceTable.from_slices(checkpoint.index, case.slices, num_ranks=case.topology.num_ranks)
    plan = plan_reads(checkpoint.index, slices, case.topology, case.limits)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.plan_hash == plan.plan_hash
    assert [node_plan.read_bytes for node_plan in copy.node_plans] == [p.read_bytes for p in plan.node_plans]


@given(num_blocks=st.integers(0, 200), num_ranks=st.integers(1, 8))
def test_equal_blocks_that_everybody_wants_are_read_evenly(num_blocks, num_ranks):
    sizes = np.full(num_blocks, 4096, dtype=np.int64)
    readers = assign_readers(np.ones((num_blocks, num_ranks), dtype=bool), sizes)
    loads = np.bincount(readers, weights=sizes, minlength=num_ranks)
    assert loads.max() - loads.min() <= 4096


@given(data=st.data(), num_blocks=st.integers(1, 60), num_ranks=st.integers(1, 6))
def test_readers_want_their_blocks_and_no_taker_of_the_last_shared_circle_is_overloaded(data, num_blocks, num_ranks):
    rows = st.lists(st.booleans(), min_size=num_ranks, max_size=num_ranks).filter(any)
    wants = np.array(data.draw(st.lists(rows, min_size=num_blocks, max_size=num_blocks)))
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=num_blocks, max_size=num_blocks)), dtype=np.int64)
    readers = assign_readers(wants, sizes)
    assert wants[np.arange(num_blocks), readers].all()
    # Blocks that everybody wants come last, so a rank that reads one of them was no fuller than the emptiest before it.
    common = wants.all(axis=1)
    loads = np.bincount(readers, weights=sizes, minlength=num_ranks)
    for rank in set(readers[common].tolist()) if num_ranks > 1 else ():
        assert loads[rank] - sizes[common].max() <= loads.min()
