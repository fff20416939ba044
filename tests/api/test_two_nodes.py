"""Two Ray nodes on one machine: right tensors, and a plan that says honestly what each node reads."""

from __future__ import annotations

from typing import Any

import pytest
from api_support import oracle

import ray_streamer

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize(
    ("tp", "replicas", "strategy", "nodes", "halves"),
    [
        # Each node holds a whole replica and reads all of it.
        pytest.param(2, 2, "auto", ((0, 1), (2, 3)), False, id="a-replica-on-each-node", marks=pytest.mark.slow),
        # What is split is read by one node, what is replicated by both.
        pytest.param(4, 1, "auto", ((0, 1), (2, 3)), True, id="four-ranks-over-two-nodes"),
        pytest.param(2, 1, "STRICT_SPREAD", ((0,), (1,)), True, id="one-rank-on-each-node"),
    ],
)
def test_two_nodes(
    checkpoint: Any, tp: int, replicas: int, strategy: Any, nodes: tuple[tuple[int, ...], ...], halves: bool
) -> None:
    # Runs of half a row are exact reads here: else a node alone reads whole rows to get its half of them.
    settings = ray_streamer.Settings(
        page_cache="off", memory_limit=1 << 20, concurrency=4, min_run_bytes=0, max_gap_bytes=0
    )
    placement = ray_streamer.PlacementOptions(strategy=strategy)
    with ray_streamer.load_sharded(
        checkpoint.uri, tp=tp, replicas=replicas, settings=settings, placement=placement
    ) as model:
        assert model.run(oracle.find_faults, checkpoint.uri) == [[]] * (tp * replicas)
        plan, report = model.plan, model.stats()

    assert plan.topology.nodes == nodes
    assert len({report.nodes[ranks[0]] for ranks in nodes}) == 2
    summary = plan.summary()
    assert summary.read_bytes == report.bytes_read == sum(rank.read_bytes for rank in summary.ranks)
    assert [rank.bytes_read for rank in report.ranks] == [rank.read_bytes for rank in summary.ranks]
    assert [rank.num_requests for rank in report.ranks] == [rank.requests for rank in summary.ranks]
    assert report.amplification == summary.amplification == 1.0
    assert report.checkpoint_bytes == checkpoint.num_bytes
    assert report.needed_bytes == summary.needed_bytes == summary.read_bytes
    fractions = [node.checkpoint_fraction for node in summary.nodes]
    if halves:
        # Half of all that is split (the vocabulary unevenly), all of the rest.
        assert fractions == pytest.approx([0.5, 0.5], abs=0.01)
        assert sum(fractions) > 1
    else:
        assert fractions == [1.0, 1.0]
        assert report.bytes_read == 2 * checkpoint.num_bytes
    # Only ranks that share a node take something from each other.
    shares_a_node = len(nodes[0]) > 1
    assert [rank.from_neighbours_bytes > 0 for rank in summary.ranks] == [shares_a_node] * len(summary.ranks)
    assert (summary.exchanged_bytes > 0) is shares_a_node


def test_a_rank_alone_on_its_node_says_that_it_reads_whole_rows(checkpoint: Any) -> None:
    settings = ray_streamer.Settings(page_cache="off")
    placement = ray_streamer.PlacementOptions(strategy="STRICT_SPREAD")
    with ray_streamer.load_sharded(checkpoint.uri, tp=2, settings=settings, placement=placement) as model:
        assert model.run(oracle.find_faults, checkpoint.uri) == [[], []]
        summary, report = model.plan.summary(), model.stats()
    assert summary.amplification == report.amplification > 1.1
    assert summary.read_bytes == report.bytes_read > report.needed_bytes
    assert sum(node.checkpoint_fraction for node in summary.nodes) > 1.1
    assert summary.exchanged_bytes == 0
