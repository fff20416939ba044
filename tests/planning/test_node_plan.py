"""Random views of random tensors, several ranks: what a node reads, counted byte by byte."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import PlanError
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.node_plan import NodePlan, plan_node
from ray_streamer.slices import RankSources, Side, SourceView

SHAPES = [(), (5,), (3, 4), (4, 0), (2, 3, 4), (64, 40), (7, 2, 3, 5)]
DTYPES = ["BF16", "F32", "F8_E4M3", "F64"]


@st.composite
def views(draw, shape):
    """A view such as slicing, permuting, expanding and as_strided give, within a tensor of `shape`."""
    sizes, strides, offset, step = [], [], 0, 1
    for size in reversed(shape):
        first = draw(st.integers(0, max(size - 1, 0)))
        stride = draw(st.sampled_from([1, 1, 1, 2, 3]))
        most = -(-(size - first) // stride)
        sizes.append(draw(st.integers(0, most) if draw(st.integers(0, 9)) == 0 else st.integers(min(1, most), most)))
        strides.append(step * stride)
        offset += first * step
        step *= max(size, 1)
    if draw(st.integers(0, 4)) == 0:
        sizes.append(draw(st.integers(1, 3)))
        strides.append(0)
    order = draw(st.permutations(range(len(sizes))))
    return SourceView(tuple(sizes[at] for at in order), Side(offset, tuple(strides[at] for at in order)))


@st.composite
def nodes(draw, make_checkpoint):
    tensors = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=6))
    specs = [(f"t{at}", dtype, shape) for at, (dtype, shape) in enumerate(tensors)]
    split = draw(st.integers(0, len(specs)))
    checkpoint = make_checkpoint([specs[:split], specs[split:]], padding=draw(st.integers(0, 9)))
    ranks = []
    for _ in range(draw(st.integers(1, 3))):
        rows = []
        for tensor in range(len(specs)):
            for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
                shape = checkpoint.index.shape_of(tensor)
                rows.append((tensor, tuple(draw(st.lists(views(shape), max_size=2)))))
        ranks.append(rows)
    limits = ReadLimits(
        block_bytes=4096,
        min_run_bytes=draw(st.sampled_from([0, 16, 1 << 18])),
        max_gap_bytes=draw(st.sampled_from([0, 64])),
    )
    return checkpoint.index, ranks, limits


def sources_of(rows):
    ids = {}
    pattern_ids = [ids.setdefault(pattern, len(ids)) for _, pattern in rows]
    tensor_ids = np.array([tensor for tensor, _ in rows], dtype=np.int32)
    return RankSources(tuple(ids), tensor_ids, np.array(pattern_ids, dtype=np.int32))


def bytes_of(index, rows):
    """Every byte that a rank wants, as (file, offset)."""
    wanted = set()
    for tensor, pattern in rows:
        width, start = index.dtype_of(tensor).num_bits // 8, index.extent_of(tensor).start
        for shape, side in pattern:
            for at in product(*map(range, shape)):
                element = side.offset + sum(step * stride for step, stride in zip(at, side.strides, strict=True))
                first = start + element * width
                wanted |= {(int(index.file_ids[tensor]), first + byte) for byte in range(width)}
    return wanted


def block_list(plan):
    return list(
        zip(*(column.tolist() for column in (plan.blocks.file_ids, plan.blocks.starts, plan.blocks.stops)), strict=True)
    )


@given(st.data())
def test_ranks_take_exactly_the_blocks_that_hold_what_they_want(make_checkpoint, data):
    index, ranks, limits = data.draw(nodes(make_checkpoint))
    plan = plan_node(index, [sources_of(rows) for rows in ranks], limits)
    wanted = [bytes_of(index, rows) for rows in ranks]
    blocks = block_list(plan)
    assert blocks == sorted(blocks)
    for (file, start, stop), consumers, reader in zip(
        blocks, plan.consumers.tolist(), plan.readers.tolist(), strict=True
    ):
        assert 0 < stop - start <= limits.block_bytes
        inside = {(file, byte) for byte in range(start, stop)}
        assert consumers == [bool(inside & bytes_of_rank) for bytes_of_rank in wanted]
        assert consumers[reader]
    read = [(file, byte) for file, start, stop in blocks for byte in range(start, stop)]
    assert len(read) == len(set(read)) == plan.read_bytes
    union = set().union(*wanted)
    assert union <= set(read)
    assert plan.needed_bytes == len(union)
    if not limits.min_run_bytes and not limits.max_gap_bytes:
        assert plan.read_bytes == plan.needed_bytes


@given(st.data())
def test_a_plan_crosses_between_processes_unchanged_and_knows_no_order_of_rows(make_checkpoint, data):
    index, ranks, limits = data.draw(nodes(make_checkpoint))
    plan = plan_node(index, [sources_of(rows) for rows in ranks], limits)
    shuffled = [sources_of(data.draw(st.permutations(rows))) for rows in ranks]
    heard = NodePlan.from_bytes(plan.to_bytes())
    for other in (plan_node(index, shuffled, limits), heard):
        assert (other.plan_hash, other.needed_bytes, other.limits) == (plan.plan_hash, plan.needed_bytes, limits)
        assert block_list(other) == block_list(plan)
        assert (other.readers.tolist(), other.consumers.tolist()) == (plan.readers.tolist(), plan.consumers.tolist())


def test_a_plan_is_another_one_for_another_checkpoint_or_rank(make_checkpoint):
    specs = [("t", "F32", (64, 40))]
    index = make_checkpoint([specs]).index
    limits = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)
    whole, half = ([(0, (SourceView(shape, Side(0, (40, 1))),))] for shape in ((64, 40), (32, 40)))
    hashes = {
        plan_node(index, [sources_of(whole)], limits).plan_hash,
        plan_node(index, [sources_of(half)], limits).plan_hash,
        plan_node(index, [sources_of(whole), sources_of(half)], limits).plan_hash,
        plan_node(make_checkpoint([specs], etag="other").index, [sources_of(whole)], limits).plan_hash,
    }
    assert len(hashes) == 4


def test_views_that_leave_their_tensor_are_refused_by_name(make_checkpoint):
    index = make_checkpoint([[("t", "F32", (4, 3))]]).index
    limits = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)
    beyond = sources_of([(0, (SourceView((4, 3), Side(1, (3, 1))),))])
    with pytest.raises(PlanError, match=r"rank 1 reads 13 elements of 't', which has the shape \(4, 3\)"):
        plan_node(index, [sources_of([]), beyond], limits)
    with pytest.raises(PlanError, match="tensor 7 of 1"):
        plan_node(index, [sources_of([(7, ())])], limits)


@pytest.mark.parametrize(
    "data", [b"", b"garbage", RankSources((), np.zeros(0, np.int32), np.zeros(0, np.int32)).to_bytes()]
)
def test_bytes_that_are_no_plan_are_refused(data):
    with pytest.raises(PlanError, match="cannot be parsed"):
        NodePlan.from_bytes(data)


def test_narrow_elements_are_read_in_whole_bytes(make_checkpoint):
    index = make_checkpoint([[("t", "F4", (4, 6))]]).index
    limits = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)
    rows = plan_node(index, [sources_of([(0, (SourceView((4, 2), Side(2, (6, 1))),))])], limits)
    assert (rows.needed_bytes, len(rows.blocks)) == (4, 4)
    with pytest.raises(PlanError, match="whole bytes"):
        plan_node(index, [sources_of([(0, (SourceView((4, 3), Side(2, (6, 1))),))])], limits)
