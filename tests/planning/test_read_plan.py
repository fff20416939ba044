"""What a plan reads in cases that a person can work out, and what makes two plans the same."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ray_streamer.errors import PlanError
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.slices import Move, Side
from ray_streamer.testing.parts import TensorPart, slices_of_parts

EXACT = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)


def _split(shape: tuple[int, ...], *, dim: int, tp: int, dp: int = 1) -> tuple[TensorPart | None, ...]:
    step = shape[dim] // tp
    return tuple(TensorPart.along(shape, dim=dim, start=i * step, stop=(i + 1) * step) for i in range(tp)) * dp


def _plan(checkpoint, slices, *, num_nodes=1, limits=EXACT):
    num_ranks = len(next(iter(slices.values())))
    return plan_reads(
        checkpoint.index, slices_of_parts(checkpoint.index, slices), Topology.even(num_ranks, num_nodes), limits
    )


def _places(checkpoint, node_plan) -> list[tuple[int, int]]:
    """Blocks as (start, stop) from the first byte of the only file's data."""
    data_start = int(checkpoint.index.starts[0])
    starts, stops = node_plan.blocks.starts.tolist(), node_plan.blocks.stops.tolist()
    return [(start - data_start, stop - data_start) for start, stop in zip(starts, stops, strict=True)]


@pytest.mark.parametrize(
    ("min_run_bytes", "max_gap_bytes", "places"),
    [
        pytest.param(8, 0, [(0, 8), (16, 24), (32, 40), (48, 56)], id="runs-as-long-as-the-limit-are-read-exactly"),
        pytest.param(9, 0, [(0, 56)], id="shorter-runs-are-read-with-what-lies-between"),
        pytest.param(8, 7, [(0, 8), (16, 24), (32, 40), (48, 56)], id="gaps-above-the-limit-split-requests"),
        pytest.param(8, 8, [(0, 56)], id="gaps-up-to-the-limit-are-read"),
    ],
)
def test_column_slice_of_one_rank(make_checkpoint, min_run_bytes, max_gap_bytes, places):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16))]])
    limits = replace(EXACT, min_run_bytes=min_run_bytes, max_gap_bytes=max_gap_bytes)
    plan = _plan(checkpoint, {"w": (TensorPart.along((4, 16), dim=1, start=0, stop=8),)}, limits=limits)
    assert _places(checkpoint, plan.node_plans[0]) == places
    assert plan.node_plans[0].needed_bytes == 32


def test_columns_that_the_neighbours_hold_together_are_one_run(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16))]])
    plan = _plan(checkpoint, {"w": _split((4, 16), dim=1, tp=4)})
    assert _places(checkpoint, plan.node_plans[0]) == [(0, 64)]


def test_blocks_are_cut_on_the_files_own_grid(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (9000,))]], padding=3)
    plan = _plan(checkpoint, {"w": (TensorPart.whole((9000,)),)})
    start = int(checkpoint.index.starts[0])
    bounds = [start, 4096, 8192, start + 9000]
    blocks = plan.node_plans[0].blocks
    assert list(zip(blocks.starts.tolist(), blocks.stops.tolist(), strict=True)) == list(pairwise(bounds))


@pytest.mark.parametrize("padding", range(12))
def test_the_grid_may_cut_a_run_at_any_byte(make_checkpoint, execute, padding):
    # Rows of 12 bytes move over the grid byte by byte, so that heads and tails of every length occur.
    checkpoint = make_checkpoint([[("w", "U8", (400, 12))]], padding=padding)
    columns = ((0, 5), (5, 6), (3, 12))
    held = tuple(TensorPart.along((400, 12), dim=1, start=start, stop=stop) for start, stop in columns)
    deliveries = execute(_plan(checkpoint, {"w": held}), checkpoint.contents)
    rows = np.frombuffer(checkpoint.tensor_bytes(0), np.uint8).reshape(400, 12)
    for rank, (start, stop) in enumerate(columns):
        assert (deliveries[rank, "w"].num_writes == 1).all()
        assert deliveries[rank, "w"].data.tobytes() == rows[:, start:stop].tobytes()


def _move(shape, source, source_starts, target, target_starts):
    return Move.box(
        shape, source_shape=source, source_starts=source_starts, target_shape=target, target_starts=target_starts
    )


@pytest.mark.parametrize(
    ("shape", "boxes", "expected"),
    [
        pytest.param(
            (4, 5, 6),
            [((2, 3, 3), (1, 1, 2), (0, 0, 0))],
            lambda tensor: tensor[1:3, 1:4, 2:5],
            id="a-box-cuts-two-inner-dimensions",
        ),
        pytest.param(
            (2, 3, 4),
            [((2, 3, 2), (0, 0, 0), (0, 0, 0)), ((2, 3, 2), (0, 0, 2), (0, 3, 0))],
            lambda tensor: np.concatenate([tensor[:, :, :2], tensor[:, :, 2:]], axis=1),
            id="column-halves-lie-below-each-other",
        ),
        pytest.param(
            (4, 3),
            [((2, 3), (0, 0), (0, 0)), ((2, 3), (2, 0), (0, 3))],
            lambda tensor: np.concatenate([tensor[:2], tensor[2:]], axis=1),
            id="row-halves-lie-side-by-side",
        ),
        pytest.param(
            (300, 130),
            [((150, 130), (0, 0), (0, 0)), ((150, 130), (150, 0), (0, 130))],
            lambda tensor: np.concatenate([tensor[:150], tensor[150:]], axis=1),
            id="long-row-halves-lie-side-by-side",
        ),
    ],
)
def test_boxes_land_where_they_say(make_checkpoint, execute, shape, boxes, expected):
    checkpoint = make_checkpoint([[("w", "U8", shape)]], padding=5)
    result = expected(np.frombuffer(checkpoint.tensor_bytes(0), np.uint8).reshape(shape))
    moves = tuple(_move(size, shape, starts, result.shape, lands) for size, starts, lands in boxes)
    plan = _plan(checkpoint, {"w": (TensorPart(result.shape, moves),)})
    delivery = execute(plan, checkpoint.contents)[0, "w"]
    assert (delivery.num_writes == 1).all()
    assert delivery.data.tobytes() == result.tobytes()


def test_grid_cells_inside_a_gap_are_not_read(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (2, 20000))]])
    limits = replace(EXACT, min_run_bytes=1 << 20)
    plan = _plan(checkpoint, {"w": (TensorPart.along((2, 20000), dim=1, start=0, stop=8),)}, limits=limits)
    assert len(plan.node_plans[0].blocks) == 2
    assert plan.node_plans[0].read_bytes < 3 * 4096


def test_replicated_tensor_is_read_once_and_evenly(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (40000,))]])
    node_plan = _plan(checkpoint, {"w": (TensorPart.whole((40000,)),) * 4}).node_plans[0]
    assert node_plan.read_bytes == node_plan.needed_bytes == 40000
    assert node_plan.consumers.all()
    lengths = node_plan.blocks.stops - node_plan.blocks.starts
    loads = [int(lengths[node_plan.readers == rank].sum()) for rank in range(4)]
    assert max(loads) - min(loads) <= 4096


def test_row_parallel_tensor_on_two_nodes_is_read_on_both(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16))]])
    limits = replace(EXACT, min_run_bytes=64)
    plan = _plan(checkpoint, {"w": _split((4, 16), dim=1, tp=4)}, num_nodes=2, limits=limits)
    assert plan.node_plan_ids == (0, 1)
    # Each node holds 8 of 16 columns: from its first run's start to its last run's end.
    assert [node_plan.read_bytes for node_plan in plan.node_plans] == [56, 56]
    assert [node_plan.needed_bytes for node_plan in plan.node_plans] == [32, 32]


def test_column_parallel_tensor_on_two_nodes_is_read_once_in_all(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16))]])
    plan = _plan(checkpoint, {"w": _split((4, 16), dim=0, tp=4)}, num_nodes=2)
    assert [node_plan.read_bytes for node_plan in plan.node_plans] == [32, 32]


def test_replicas_share_one_node_plan(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16)), ("b", "U8", (3,))]])
    slices = {"w": _split((4, 16), dim=1, tp=2, dp=3), "b": (TensorPart.whole((3,)),) * 6}
    plan = _plan(checkpoint, slices, num_nodes=3)
    assert len(plan.node_plans) == 1
    assert plan.node_plan_ids == (0, 0, 0)
    assert plan.node_plan_of(1)[0] is plan.node_plan_of(5)[0]
    assert plan.node_plan_of(5)[1] == 1


def test_nothing_wanted_reads_nothing(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (4, 16)), ("e", "U8", (0, 3))]])
    node_plan = _plan(checkpoint, {"e": (TensorPart.whole((0, 3)),) * 2}).node_plans[0]
    assert (len(node_plan.blocks), node_plan.needed_bytes) == (0, 0)


BASE = {
    "tensors": [[("v", "U8", (4, 16)), ("w", "U8", (4, 16))]],
    "etag": "e",
    "slices": {"w": _split((4, 16), dim=1, tp=4)},
    "nodes": ((0, 1), (2, 3)),
    "limits": EXACT,
}


def _base_plan(make_checkpoint, **changes):
    case = BASE | changes
    index = make_checkpoint(case["tensors"], etag=case["etag"]).index
    return plan_reads(index, slices_of_parts(index, case["slices"]), Topology(case["nodes"]), case["limits"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"etag": "f"}, id="another-etag"),
        pytest.param({"limits": replace(EXACT, block_bytes=8192)}, id="another-block-size"),
        pytest.param({"limits": replace(EXACT, min_run_bytes=1)}, id="another-limit-with-the-same-blocks"),
        pytest.param({"nodes": ((0, 1, 2, 3),)}, id="another-number-of-nodes"),
        pytest.param({"nodes": ((1, 0), (2, 3))}, id="another-order-on-a-node"),
        pytest.param({"slices": {"w": _split((4, 16), dim=0, tp=4)}}, id="other-slices"),
        pytest.param({"slices": {"v": _split((4, 16), dim=1, tp=4)}}, id="the-same-slices-of-another-tensor"),
        pytest.param({"tensors": [[("v", "I8", (4, 16)), ("w", "U8", (4, 16))]]}, id="another-dtype-of-the-same-width"),
    ],
)
def test_hash_changes_with_every_input(make_checkpoint, changes):
    assert _base_plan(make_checkpoint, **changes).plan_hash != _base_plan(make_checkpoint).plan_hash


def test_hash_tells_topologies_apart_that_read_alike(make_checkpoint):
    slices = {"w": (TensorPart.whole((4, 16)),) * 4}
    plans = [_base_plan(make_checkpoint, slices=slices, nodes=nodes) for nodes in (((0, 1), (2, 3)), ((0, 2), (1, 3)))]
    assert plans[0].node_plans[0].plan_hash == plans[1].node_plans[0].plan_hash
    assert plans[0].plan_hash != plans[1].plan_hash


def test_hash_tells_ranks_apart_that_hold_other_parts_of_one_block(make_checkpoint):
    halves = _split((4, 16), dim=0, tp=4)
    plans = [_base_plan(make_checkpoint, slices={"w": held}, nodes=((0, 1, 2, 3),)) for held in (halves, halves[::-1])]
    assert plans[0].node_plans[0].plan_hash == plans[1].node_plans[0].plan_hash
    assert plans[0].plan_hash != plans[1].plan_hash


def test_hash_tells_slices_apart_that_hold_no_bytes(make_checkpoint):
    tensors = [[("u", "U8", (4,)), ("v", "U8", (0, 4)), ("w", "U8", (0, 4))]]
    held = (TensorPart.whole((0, 4)),) * 4
    plans = [_base_plan(make_checkpoint, tensors=tensors, slices={name: held}) for name in ("v", "w")]
    assert plans[0].plan_hash != plans[1].plan_hash


def test_hash_is_the_same_in_every_process(make_checkpoint, tmp_path):
    plan = _base_plan(make_checkpoint)
    inputs = tmp_path / "inputs.pickle"
    inputs.write_bytes(pickle.dumps((plan.index, plan.slices, plan.topology, plan.limits)))
    program = (
        "import pickle, sys; from ray_streamer.planning.read_plan import plan_reads;"
        "print(plan_reads(*pickle.load(open(sys.argv[1], 'rb'))).plan_hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program, str(inputs)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {plan.plan_hash}


@pytest.mark.parametrize(
    ("dtype", "shape", "held", "message"),
    [
        pytest.param(
            "U8",
            (4,),
            TensorPart((5,), (Move((5,), Side(0, (1,)), Side(0, (1,))),)),
            "reads 5 elements",
            id="leaves-the-tensor",
        ),
        pytest.param(
            "U8",
            (4,),
            TensorPart((2,), (Move((2,), Side(0, (1,)), Side(1, (1,))),)),
            "none of its shape",
            id="leaves-the-result",
        ),
        pytest.param("F4", (4,), TensorPart.along((4,), dim=0, start=1, stop=4), "whole bytes", id="cuts-a-byte"),
        pytest.param("F4", (2, 3), TensorPart.along((2, 3), dim=1, start=0, stop=2), "whole bytes", id="odd-rows"),
    ],
)
def test_slices_that_cannot_be_read_are_refused(make_checkpoint, dtype, shape, held, message):
    with pytest.raises(PlanError, match=message):
        _plan(make_checkpoint([[("w", dtype, shape)]]), {"w": (held,)})


def test_slices_of_another_checkpoint_or_for_other_ranks_are_refused(make_checkpoint):
    index = make_checkpoint([[("w", "U8", (4,))]]).index
    other = make_checkpoint([[("v", "U8", (4,)), ("w", "U8", (4,))]]).index
    slices = slices_of_parts(other, {"w": (TensorPart.whole((4,)),)})
    with pytest.raises(PlanError, match="reads tensor 1 of 1 in memory://tiny"):
        plan_reads(index, slices, Topology.even(1), EXACT)
    with pytest.raises(PlanError, match="slices are for 1 rank, the topology has 2"):
        plan_reads(other, slices, Topology.even(2), EXACT)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param((), id="no-node"),
        pytest.param(((0,), ()), id="an-empty-node"),
        pytest.param(((0, 1), (1,)), id="a-rank-on-two-nodes"),
        pytest.param(((0, 2),), id="a-missing-rank"),
    ],
)
def test_topology_refuses(nodes):
    with pytest.raises(PlanError, match="every rank from 0 on exactly one node"):
        Topology(nodes)


def test_even_topology_fills_the_first_nodes():
    assert Topology.even(5, 3).nodes == ((0, 1), (2, 3), (4,))
    with pytest.raises(PlanError, match="2 ranks cannot lie on 3 nodes"):
        Topology.even(2, 3)
