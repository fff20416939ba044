"""Figures and reasons of plans that a person can work out, and that they agree with the tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from ray_streamer.errors import PlanError
from ray_streamer.planning.export import write_plan
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.summary import summarize
from ray_streamer.planning.tensor_reads import explain_tensors
from ray_streamer.planning.topology import Topology
from ray_streamer.testing.parts import TensorPart, slices_of_parts

LIMITS = ReadLimits(block_bytes=4096, min_run_bytes=64, max_gap_bytes=0)


def _split(shape: tuple[int, ...], *, dim: int, tp: int) -> tuple[TensorPart, ...]:
    step = shape[dim] // tp
    return tuple(TensorPart.along(shape, dim=dim, start=i * step, stop=(i + 1) * step) for i in range(tp))


def _plan(checkpoint, slices, *, nodes, limits=LIMITS):
    topology = Topology(nodes)
    return plan_reads(checkpoint.index, slices_of_parts(checkpoint.index, slices), topology, limits)


@pytest.fixture
def row_parallel(make_checkpoint):
    """One tensor of 4 rows of 16 bytes, of which each of 4 ranks holds 4 columns."""
    checkpoint = make_checkpoint([[("w", "U8", (4, 16))]])
    return lambda nodes: _plan(checkpoint, {"w": _split((4, 16), dim=1, tp=4)}, nodes=nodes)


def test_one_node_reads_once_and_exchanges(row_parallel):
    summary = summarize(row_parallel(((0, 1, 2, 3),)))
    assert (summary.needed_bytes, summary.read_bytes, summary.amplification, summary.requests) == (64, 64, 1.0, 1)
    assert summary.nodes[0].checkpoint_fraction == 1.0
    assert [rank.read_bytes for rank in summary.ranks] == [64, 0, 0, 0]
    assert [rank.requests for rank in summary.ranks] == [1, 0, 0, 0]
    assert [rank.result_bytes for rank in summary.ranks] == [16, 16, 16, 16]
    assert [rank.from_neighbours_bytes for rank in summary.ranks] == [0, 16, 16, 16]
    assert [rank.direct_bytes for rank in summary.ranks] == [0, 0, 0, 0]
    assert summary.exchanged_bytes == 48


def test_two_nodes_read_on_both_and_exchange_inside_each(row_parallel):
    summary = summarize(row_parallel(((3, 0), (1, 2))))
    # Ranks 3 and 0 hold the outer columns: from the first byte to the last. Ranks 1 and 2 hold bytes 4 to 60.
    assert [node.ranks for node in summary.nodes] == [(3, 0), (1, 2)]
    assert [node.read_bytes for node in summary.nodes] == [64, 56]
    assert [node.needed_bytes for node in summary.nodes] == [32, 32]
    assert [node.amplification for node in summary.nodes] == [2.0, 1.75]
    assert [node.checkpoint_fraction for node in summary.nodes] == [1.0, 0.875]
    assert (summary.needed_bytes, summary.read_bytes, summary.amplification) == (64, 120, 1.875)
    assert [(rank.rank, rank.node, rank.read_bytes) for rank in summary.ranks] == [
        (0, 0, 0),
        (1, 1, 56),
        (2, 1, 0),
        (3, 0, 64),
    ]
    assert summary.exchanged_bytes == 32


def test_a_block_that_only_one_rank_wants_is_direct(make_checkpoint):
    checkpoint = make_checkpoint([[("a", "U8", (2, 100)), ("b", "U8", (50,))]])
    slices = {"a": _split((2, 100), dim=0, tp=2), "b": (TensorPart.whole((50,)), None)}
    # On a grid so fine that no block is shared there would be none to exchange; one block holds it all here.
    shared = summarize(_plan(checkpoint, slices, nodes=((0, 1),)))
    assert [(rank.direct_bytes, rank.from_neighbours_bytes) for rank in shared.ranks] == [(0, 0), (0, 100)]
    apart = summarize(_plan(checkpoint, slices, nodes=((0,), (1,))))
    assert [(rank.direct_bytes, rank.from_neighbours_bytes) for rank in apart.ranks] == [(150, 0), (100, 0)]


def test_replicas_are_counted_on_each_node(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (10,))]])
    summary = summarize(_plan(checkpoint, {"w": (TensorPart.whole((10,)),) * 3}, nodes=((0,), (1,), (2,))))
    assert (summary.needed_bytes, summary.read_bytes, summary.requests) == (30, 30, 3)
    assert sum(node.checkpoint_fraction for node in summary.nodes) == 3.0


def test_nothing_needed_is_amplified_by_one(make_checkpoint):
    checkpoint = make_checkpoint([[("e", "U8", (0,))]])
    summary = summarize(_plan(checkpoint, {"e": (TensorPart.whole((0,)),)}, nodes=((0,),)))
    assert (summary.amplification, summary.nodes[0].amplification, summary.nodes[0].checkpoint_fraction) == (1, 1, 0)


def test_summary_as_json(row_parallel):
    plan = row_parallel(((0, 1, 2, 3),))
    figures = summarize(plan).as_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert list(figures) == [
        "uri",
        "checkpoint_bytes",
        "num_tensors",
        "num_files",
        "num_ranks",
        "num_nodes",
        "needed_bytes",
        "read_bytes",
        "amplification",
        "requests",
        "exchanged_bytes",
        "plan_seconds",
        "plan_hash",
        "block_bytes",
        "min_run_bytes",
        "nodes",
        "ranks",
    ]
    assert figures["plan_hash"] == plan.plan_hash
    assert figures["nodes"][0]["ranks"] == [0, 1, 2, 3]


@pytest.fixture
def mixed(make_checkpoint):
    """One tensor for each strategy on two nodes of two ranks, in two files."""
    checkpoint = make_checkpoint(
        [
            [("covered", "BF16", (4, 64)), ("empty", "F32", (0, 4)), ("exact", "F32", (8, 40))],
            [("replicated", "U8", (100,)), ("long", "U8", (4, 512)), ("skipped", "U8", (7,)), ("whole", "U8", (6, 4))],
        ]
    )
    slices = {
        "covered": _split((4, 64), dim=1, tp=4),
        "empty": (TensorPart.whole((0, 4)),) * 4,
        "exact": _split((8, 40), dim=0, tp=4),
        "long": _split((4, 512), dim=1, tp=4),
        "replicated": (TensorPart.whole((100,)),) * 4,
        "whole": (*_split((6, 4), dim=0, tp=2), None, None),
    }
    return _plan(checkpoint, slices, nodes=((0, 1), (2, 3)), limits=replace(LIMITS, min_run_bytes=100))


def test_every_strategy_says_why(mixed):
    reads = {read.name: read for read in explain_tensors(mixed, rank=1)}
    assert {name: (read.strategy, read.reason) for name, read in reads.items()} == {
        "covered": (
            "covered",
            "runs of 64 B are below min_run_bytes (100 B): they are read with what lies between, up to 448 B;"
            " 256 B of 512 B are wanted",
        ),
        "empty": ("empty", "the tensor has no bytes"),
        "exact": ("exact", "one run of 640 B; 640 B of 1.25 KiB are wanted"),
        "long": (
            "exact",
            "4 runs of at least 256 B, read as they are with min_run_bytes of 100 B; 1 KiB of 2 KiB are wanted",
        ),
        "replicated": ("replicated", "all 2 ranks of the node hold all 100 B: read once for all"),
        "skipped": ("skipped", "rank 1 holds nothing of it"),
        "whole": ("whole", "the ranks of the node hold all 24 B between them"),
    }


def test_one_ranks_figures(mixed):
    reads = {read.name: read for read in explain_tensors(mixed, rank=1)}
    covered = reads["covered"]
    assert (covered.dtype, covered.shape, covered.result_shape) == ("BF16", (4, 64), (4, 16))
    assert (covered.num_bytes, covered.result_bytes, covered.needed_bytes, covered.read_bytes) == (512, 128, 256, 448)
    assert (reads["skipped"].result_shape, reads["skipped"].result_bytes, reads["skipped"].read_bytes) == (None, 0, 0)
    assert (reads["empty"].result_shape, reads["empty"].read_bytes) == ((0, 4), 0)


def test_a_rank_without_a_part_still_sees_what_its_node_reads(mixed):
    reads = {read.name: read for read in explain_tensors(mixed, rank=3)}
    assert (reads["whole"].strategy, reads["whole"].read_bytes) == ("skipped", 0)
    with pytest.raises(PlanError, match="rank 4"):
        explain_tensors(mixed, rank=4)


def test_all_nodes_figures(mixed):
    reads = {read.name: read for read in explain_tensors(mixed)}
    covered = reads["covered"]
    assert (covered.strategy, covered.result_shape, covered.result_bytes) == ("covered", None, 512)
    assert (covered.needed_bytes, covered.read_bytes) == (512, 896)
    assert (reads["skipped"].strategy, reads["skipped"].reason) == ("skipped", "no rank holds any of it")
    assert (reads["replicated"].result_bytes, reads["replicated"].read_bytes) == (400, 200)
    assert (reads["whole"].strategy, reads["whole"].read_bytes) == ("whole", 24)


@pytest.mark.parametrize("nodes", [((3, 0), (1, 2)), ((1, 2), (3, 0))])
def test_the_verdict_is_that_of_the_node_that_wastes_most(row_parallel, nodes):
    (read,) = explain_tensors(row_parallel(nodes))
    assert read.strategy == "covered"
    assert "up to 64 B" in read.reason
    assert (read.needed_bytes, read.read_bytes, read.result_bytes) == (64, 120, 64)


def test_replicas_count_once_for_each_node(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (10,))]])
    plan = _plan(checkpoint, {"w": (TensorPart.whole((10,)),) * 3}, nodes=((0,), (1,), (2,)))
    (read,) = explain_tensors(plan)
    assert (read.needed_bytes, read.read_bytes, read.result_bytes, read.strategy) == (30, 30, 30, "whole")
    (read,) = explain_tensors(plan, rank=2)
    assert (read.needed_bytes, read.read_bytes, read.result_bytes) == (10, 10, 10)


def test_an_empty_slice_of_a_tensor_that_is_not(make_checkpoint):
    checkpoint = make_checkpoint([[("w", "U8", (3,))]])
    shares = tuple(TensorPart.along((3,), dim=0, start=start, stop=stop) for start, stop in ((0, 3), (3, 3)))
    plan = _plan(checkpoint, {"w": shares}, nodes=((0, 1),))
    (read,) = explain_tensors(plan, rank=1)
    assert (read.strategy, read.reason, read.read_bytes) == ("empty", "the slice of rank 1 has no bytes", 3)


def test_most_expensive_first(mixed):
    reads = explain_tensors(mixed)
    costs = [read.read_bytes for read in reads]
    assert costs == sorted(costs, reverse=True)
    assert explain_tensors(mixed, top=2) == reads[:2]


def test_tensors_sum_to_the_plan(mixed):
    summary, reads = summarize(mixed), explain_tensors(mixed)
    assert sum(read.read_bytes for read in reads) == summary.read_bytes
    assert sum(read.needed_bytes for read in reads) == summary.needed_bytes
    assert sum(read.num_bytes for read in reads) == summary.checkpoint_bytes
    assert sum(read.result_bytes for read in reads) == sum(rank.result_bytes for rank in summary.ranks)


def test_written_files_hold_the_plan(mixed, tmp_path):
    write_plan(mixed, tmp_path / "new" / "plan")
    blocks = pq.read_table(tmp_path / "new" / "plan" / "blocks.parquet").to_pylist()
    pieces = pq.read_table(tmp_path / "new" / "plan" / "pieces.parquet").to_pylist()
    summary = summarize(mixed)
    assert json.loads((tmp_path / "new" / "plan" / "summary.json").read_text()) == summary.as_dict()
    assert len(blocks) == summary.requests
    assert {block["path"] for block in blocks} == {file.path for file in mixed.index.files}
    by_place = {(block["node"], block["block"]): block for block in blocks}
    for rank in summary.ranks:
        read = [block for block in blocks if block["reader"] == rank.rank]
        assert {block["node"] for block in read} <= {rank.node}
        assert sum(block["stop"] - block["start"] for block in read) == rank.read_bytes
        taken = [piece for piece in pieces if piece["rank"] == rank.rank]
        plain = [piece for piece in taken if piece["move"] is None]
        moved = {piece["result"] for piece in taken} - {piece["result"] for piece in plain}
        # Rows of 32 bytes are too short to be copied as such.
        assert moved == {"covered"}
        assert sum(piece["run_bytes"] * piece["num_runs"] for piece in plain) + 128 == rank.result_bytes
        for piece in taken:
            block = by_place[piece["node"], piece["block"]]
            extent = mixed.index.extent_of(mixed.index.position(piece["result"]))
            first = block["start"] + piece["source_start"]
            assert piece["node"] == rank.node
            if piece["move"] is None:
                assert extent.start <= first < first + piece["run_bytes"] <= extent.stop
            else:
                assert first == extent.start
                assert piece["move"] == "BF16 -> BF16 [(4, 64, 16), (16, 1, 1)]"
