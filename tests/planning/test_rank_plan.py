"""One rank's view of its node's plan, against a reading of the tables row by row."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_streamer.extent import Extent
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.rank_plan import Block, Piece, RankPlan
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Replicate, Skip, Split, SplitVocabulary
from ray_streamer.sharding.slices import SliceTable, TensorSlice

PIECE_FIELDS = Piece._fields


@st.composite
def _plans(draw, make_checkpoint):
    num_ranks = draw(st.integers(1, 5))
    order = draw(st.permutations(range(num_ranks)))
    bounds = sorted(draw(st.sets(st.integers(1, num_ranks - 1), max_size=2))) if num_ranks > 1 else []
    tensors_by_file, slices = [], {}
    for file in range(draw(st.integers(1, 2))):
        tensors_by_file.append([])
        for number in range(draw(st.integers(0, 4))):
            shape = tuple(draw(st.lists(st.integers(0, 90), min_size=2, max_size=2)))
            placement = draw(st.sampled_from([Replicate(), Skip(), SplitVocabulary(0), SplitVocabulary(1), Split(0)]))
            if placement.refusal(shape, num_ranks):
                placement = SplitVocabulary(0)
            name = f"{file}.{number}"
            tensors_by_file[-1].append((name, draw(st.sampled_from(["U8", "F32", "I64"])), shape))
            slices[name] = tuple(placement.slice_of(shape, tp_index=rank, tp=num_ranks) for rank in range(num_ranks))
            if draw(st.booleans()):
                # The first rank holds some rows twice, so a block that is its own may hold two pieces.
                rows = (0, shape[0] // 2)
                slices[name] = (TensorSlice.parts(shape, dim=0, parts=(rows, rows)), *slices[name][1:])
    index = make_checkpoint(tensors_by_file).index
    limits = ReadLimits(
        block_bytes=4096,
        min_run_bytes=draw(st.sampled_from([0, 100, 1 << 20])),
        max_gap_bytes=draw(st.sampled_from([0, 500])),
    )
    topology = Topology(tuple(tuple(order[a:b]) for a, b in pairwise([0, *bounds, num_ranks])))
    return plan_reads(index, SliceTable.from_slices(index, slices, num_ranks=num_ranks), topology, limits)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_rank_plan_says_what_the_tables_say(data, make_checkpoint):
    plan = data.draw(_plans(make_checkpoint))
    for node, ranks in enumerate(plan.topology.nodes):
        node_plan = plan.node_plans[plan.node_plan_ids[node]]
        blocks, pieces = node_plan.blocks.to_pylist(), node_plan.pieces.to_pylist()
        for local_rank, rank in enumerate(ranks):
            mine = RankPlan.of(plan, rank)
            assert (mine.rank, mine.local_rank, mine.neighbours) == (rank, local_rank, ranks)
            assert mine.reads.tolist() == [n for n, row in enumerate(blocks) if row["reader"] == local_rank]
            my_rows = [row for row in pieces if row["rank"] == local_rank]
            assert mine.taken.tolist() == sorted({row["block"] for row in my_rows})
            assert mine.files() == sorted({row["file"] for row in blocks})
            _check_blocks(mine, blocks, pieces)
            tensor_bytes = np.zeros(len(plan.index), dtype=np.int64)
            for row in my_rows:
                tensor_bytes[row["tensor"]] += row["run_bytes"] * row["num_runs"]
            assert np.array_equal(mine.tensor_bytes, tensor_bytes)


def _check_blocks(mine: RankPlan, blocks, pieces) -> None:
    for number, row in enumerate(blocks):
        extent = Extent(row["start"], row["stop"])
        assert mine.block(number) == Block(number, row["file"], extent, row["reader"])
        my_pieces = [
            Piece(*(piece[name] for name in PIECE_FIELDS))
            for piece in pieces
            if piece["block"] == number and piece["rank"] == mine.local_rank
        ]
        assert mine.pieces(number) == my_pieces
        takers = {piece["rank"] for piece in pieces if piece["block"] == number}
        if row["reader"] == mine.local_rank:
            assert mine.takers(number) == tuple(sorted(takers - {mine.local_rank}))
        is_exclusive = (
            takers == {mine.local_rank}
            and row["reader"] == mine.local_rank
            and len(my_pieces) == 1
            and (my_pieces[0].num_runs, my_pieces[0].run_bytes) == (1, extent.num_bytes)
        )
        assert mine.exclusive_piece(number) == (my_pieces[0] if is_exclusive else None)
    numbers = np.arange(len(blocks))
    assert mine.files_of(numbers).tolist() == [row["file"] for row in blocks]
    assert mine.readers_of(numbers).tolist() == [row["reader"] for row in blocks]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_plan_of_nothing(make_checkpoint, num_ranks):
    index = make_checkpoint([[]]).index
    table = SliceTable.from_slices(index, {}, num_ranks=num_ranks)
    limits = ReadLimits(block_bytes=4096, min_run_bytes=0, max_gap_bytes=0)
    mine = RankPlan.of(plan_reads(index, table, Topology.even(num_ranks), limits), num_ranks - 1)
    assert (mine.reads.size, mine.taken.size, mine.files()) == (0, 0, [])


def test_the_bytes_of_a_piece():
    assert Piece(0, 5, 3, 4, 10, 0, 3).num_bytes == 12
