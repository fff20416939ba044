"""Plans of real models' headers: the figures that the design promises."""

from __future__ import annotations

import pytest

from ray_streamer.planning.explain import summarize
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.tensor_reads import explain_tensors
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh, ShardRules, resolve_slices
from ray_streamer.testing.layouts import deepseek_v3_layout, llama_layout
from ray_streamer.testing.plan_inputs import DEEPSEEK_V3_RULES, header_only_index

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)


@pytest.fixture(scope="module")
def deepseek():
    return header_only_index(deepseek_v3_layout().tensors, num_files=163)


def _plan(index, rules, *, tp, num_nodes, dp=1):
    mesh = Mesh(tp=tp, dp=dp)
    return plan_reads(index, resolve_slices(index, rules, mesh), Topology.even(mesh.num_ranks, num_nodes), LIMITS)


def test_deepseek_on_one_node_reads_every_byte_once(deepseek):
    plan = _plan(deepseek, DEEPSEEK_V3_RULES, tp=16, num_nodes=1)
    summary = summarize(plan)
    assert (summary.num_tensors, summary.num_files) == (91_991, 163)
    assert summary.read_bytes == summary.needed_bytes == summary.checkpoint_bytes == deepseek.total_bytes
    assert summary.amplification == 1.0
    loads = [rank.read_bytes for rank in summary.ranks]
    assert max(loads) - min(loads) <= LIMITS.block_bytes
    reads = explain_tensors(plan)
    assert len(reads) == 91_991
    assert {read.strategy for read in reads} == {"whole", "replicated"}
    assert sum(read.read_bytes for read in reads) == summary.read_bytes


def test_deepseek_on_two_nodes_says_what_is_read_twice(deepseek):
    plan = _plan(deepseek, DEEPSEEK_V3_RULES, tp=16, num_nodes=2)
    summary = summarize(plan)
    # down_proj and o_proj are cut along their inner dimension: 8 of 16 columns' shares are short runs on either node.
    covered = [read for read in explain_tensors(plan) if read.strategy == "covered"]
    assert {read.name.split(".")[-2] for read in covered} == {"down_proj", "o_proj"}
    assert 1.3 < summary.amplification < 1.4
    assert sum(node.checkpoint_fraction for node in summary.nodes) == pytest.approx(
        summary.read_bytes / summary.checkpoint_bytes
    )


def test_replicas_of_deepseek_are_planned_once(deepseek):
    plan = _plan(deepseek, DEEPSEEK_V3_RULES, tp=8, dp=64, num_nodes=64)
    assert len(plan.node_plans) == 1
    assert summarize(plan).read_bytes == 64 * deepseek.total_bytes


def test_llama_70b_on_one_node_reads_every_byte_once():
    layout = llama_layout(8192, 80, 64, 8, 28672, 128256)
    index = header_only_index(layout.tensors, num_files=30)
    summary = summarize(_plan(index, ShardRules.for_config(layout.config), tp=8, num_nodes=1))
    assert summary.num_tensors == 723
    assert summary.read_bytes == summary.checkpoint_bytes
    assert summary.requests < 1.1 * summary.checkpoint_bytes / LIMITS.block_bytes + summary.num_files
