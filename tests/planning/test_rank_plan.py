"""One rank's part of its node's plan: every byte that it wants, once, in the blocks that it is told to take."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_streamer.errors import PlanError
from ray_streamer.extent import Extent
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.rank_plan import Block, Piece, RankPlan
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.testing.parts import TensorPart, even_parts, slices_of_parts

LIMITS = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)


@st.composite
def _cases(draw, make_checkpoint):
    num_ranks = draw(st.integers(1, 5))
    order = draw(st.permutations(range(num_ranks)))
    bounds = sorted(draw(st.sets(st.integers(1, num_ranks - 1), max_size=2))) if num_ranks > 1 else []
    tensors_by_file, parts = [], {}
    for file in range(draw(st.integers(1, 2))):
        tensors_by_file.append([])
        for number in range(draw(st.integers(0, 4))):
            shape = tuple(draw(st.lists(st.integers(0, 90), min_size=2, max_size=2)))
            kind = draw(st.sampled_from(["whole", "skip", "rows", "columns"]))
            held = (TensorPart.whole(shape),) * num_ranks if kind == "whole" else (None,) * num_ranks
            name = f"{file}.{number}"
            tensors_by_file[-1].append((name, draw(st.sampled_from(["U8", "F32", "I64"])), shape))
            parts[name] = (
                even_parts(shape, num_ranks, dim=int(kind == "columns")) if kind in ("rows", "columns") else held
            )
            if draw(st.booleans()):
                # The first rank holds some rows twice, so a block that is its own may hold two pieces.
                rows = (0, shape[0] // 2)
                parts[name] = (TensorPart.ranges(shape, dim=0, ranges=(rows, rows)), *parts[name][1:])
    checkpoint = make_checkpoint(tensors_by_file, padding=draw(st.integers(0, 9)))
    limits = ReadLimits(
        block_bytes=4096,
        min_run_bytes=draw(st.sampled_from([0, 100, 1 << 20])),
        max_gap_bytes=draw(st.sampled_from([0, 500])),
    )
    topology = Topology(tuple(tuple(order[a:b]) for a, b in pairwise([0, *bounds, num_ranks])))
    slices = (
        slices_of_parts(checkpoint.index, parts)
        if parts
        else [RankSlices.from_rows(checkpoint.index, [], [])] * num_ranks
    )
    return checkpoint, plan_reads(checkpoint.index, slices, topology, limits)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_result_gets_its_bytes_once(data, make_checkpoint, execute):
    checkpoint, plan = data.draw(_cases(make_checkpoint))
    deliveries = execute(plan, checkpoint.contents)
    for rank, said in enumerate(plan.slices):
        for spec, tensor, pattern in zip(said.results, said.tensor_ids, said.pattern_ids, strict=True):
            width = spec.stored.num_bits // 8
            source = np.frombuffer(checkpoint.tensor_bytes(tensor), np.uint8)
            expected = np.zeros(spec.num_storage_elements * width, np.uint8)
            for move in said.patterns[pattern]:
                views = [
                    np.ndarray(
                        (*move.shape, width),
                        np.uint8,
                        memory,
                        side.offset * width,
                        [*(n * width for n in side.strides), 1],
                    )
                    for memory, side in ((source, move.source), (expected, move.target))
                    if move.num_elements
                ]
                if views:
                    views[1][...] = views[0]
            delivery = deliveries[rank, spec.name]
            assert (delivery.num_writes == 1).all()
            assert delivery.data.tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_rank_plan_says_what_the_node_plan_says(data, make_checkpoint):
    _, plan = data.draw(_cases(make_checkpoint))
    for node, ranks in enumerate(plan.topology.nodes):
        node_plan = plan.node_plans[plan.node_plan_ids[node]]
        files, starts, stops = (
            column.tolist() for column in (node_plan.blocks.file_ids, node_plan.blocks.starts, node_plan.blocks.stops)
        )
        for local_rank, rank in enumerate(ranks):
            mine = plan.rank_plan(rank)
            assert (mine.rank, mine.local_rank, mine.ranks) == (rank, local_rank, ranks)
            assert mine.reads.tolist() == [n for n, reader in enumerate(node_plan.readers) if reader == local_rank]
            assert mine.wanted_files() == sorted(set(files))
            for number, (file, start, stop) in enumerate(zip(files, starts, stops, strict=True)):
                reader = int(node_plan.readers[number])
                extent = Extent(start, stop)
                assert mine.block(number) == Block(number, file, extent, reader)
                consumers = set(np.flatnonzero(node_plan.consumers[number]).tolist())
                assert mine.consumers(number) == tuple(sorted(consumers - {local_rank}))
                plain, strided = mine.pieces(number)
                assert bool(plain or strided) == (local_rank in consumers)
                is_exclusive = (
                    consumers == {local_rank}
                    and not strided
                    and [(piece.num_runs, piece.run_bytes) for piece in plain] == [(1, extent.num_bytes)]
                )
                assert mine.exclusive_piece(number) == (plain[0] if is_exclusive else None)
            numbers = np.arange(len(files))
            assert mine.files_of(numbers).tolist() == files
            assert mine.readers_of(numbers).tolist() == node_plan.readers.tolist()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_plan_of_nothing(make_checkpoint, num_ranks):
    index = make_checkpoint([[]]).index
    said = RankSlices.from_rows(index, [], [])
    mine = plan_reads(index, [said] * num_ranks, Topology.even(num_ranks), LIMITS).rank_plan(num_ranks - 1)
    assert (mine.reads.size, mine.taken.size, mine.wanted_files()) == (0, 0, [])


def test_the_bytes_of_a_piece():
    assert Piece(0, 5, 3, 4, 10, 0, 3).num_bytes == 12


def test_slices_that_the_node_did_not_plan_are_refused(make_checkpoint):
    index = make_checkpoint([[("w", "U8", (8192,))]]).index
    first, last = (
        slices_of_parts(index, {"w": (TensorPart.along((8192,), dim=0, start=start, stop=start + 100),)})[0]
        for start in (0, 8000)
    )
    plan = plan_reads(index, [first], Topology.even(1), LIMITS)
    with pytest.raises(PlanError, match="rank 3 said other slices"):
        RankPlan.of(index, plan.node_plans[0], last, ranks=(3,), local_rank=0)


def test_a_transposed_matrix_is_a_few_pieces(make_checkpoint):
    index = make_checkpoint([[("w", "BF16", (7168, 256))]]).index
    spec = ResultSpec(name="w", dtype="BF16", shape=(256, 7168))
    move = Move((7168, 256), Side(0, (256, 1)), Side(0, (1, 7168)))
    limits = ReadLimits(block_bytes=1 << 20, min_run_bytes=0, max_gap_bytes=0)
    plan = plan_reads(index, [RankSlices.from_rows(index, [spec], [("w", "w", [move])])], Topology.even(1), limits)
    mine = plan.rank_plan(0)
    pieces = [mine.pieces(number) for number in mine.taken.tolist()]
    assert len(pieces) == 4
    assert all(not plain and len(strided) == 1 for plain, strided in pieces)


@pytest.mark.parametrize(
    ("tensors", "dim", "num_runs"),
    [([(64, 32)], 0, 1), ([(4, 32)] * 16, 0, 16), ([(4, 32)] * 17, 0, 0), ([(64, 32)], 1, 0)],
    ids=["rows", "as-many-as-are-few", "many", "columns"],
)
def test_a_few_runs_of_a_block(make_checkpoint, tensors, dim, num_runs):
    index = make_checkpoint([[(str(number), "U8", shape) for number, shape in enumerate(tensors)]]).index
    parts = {str(number): even_parts(shape, 2, dim=dim) for number, shape in enumerate(tensors)}
    limits = ReadLimits(block_bytes=4096, min_run_bytes=1 << 20, max_gap_bytes=1 << 20)
    mine = plan_reads(index, slices_of_parts(index, parts), Topology.even(2), limits).rank_plan(1)
    assert mine.taken.tolist() == [0]
    runs = mine.few_runs(0)
    assert runs == (mine.pieces(0).plain if num_runs else [])
    assert len(runs) == num_runs


def test_a_strided_move_is_not_a_run(make_checkpoint):
    index = make_checkpoint([[("w", "BF16", (16, 16))]]).index
    spec = ResultSpec(name="w", dtype="BF16", shape=(16, 16))
    move = Move((16, 16), Side(0, (16, 1)), Side(0, (1, 16)))
    plan = plan_reads(index, [RankSlices.from_rows(index, [spec], [("w", "w", [move])])], Topology.even(1), LIMITS)
    assert plan.rank_plan(0).few_runs(0) == []
