"""Plans of real models' headers: the figures that the design promises."""

from __future__ import annotations

import pytest

from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.summary import summarize
from ray_streamer.planning.tensor_reads import explain_tensors
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh, ShardRules
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.testing.layouts import deepseek_v3_layout, llama_layout, mixtral_layout, qwen3_layout
from ray_streamer.testing.plan_inputs import DEEPSEEK_V3_RULES, header_only_index

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)


@pytest.fixture(scope="module")
def deepseek():
    layout = deepseek_v3_layout()
    return header_only_index(layout.tensors, num_files=163, config=layout.config)


def _plan(index, rules, *, num_nodes, **sizes):
    mesh = Mesh(**sizes)
    source = RuleSlices(mesh=mesh, rules=rules)
    slices = [source(index, rank) for rank in range(mesh.num_ranks)]
    return plan_reads(index, slices, Topology.even(mesh.num_ranks, num_nodes), LIMITS)


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


@pytest.mark.slow
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


PUBLISHED = {
    "Llama-3-8B": (llama_layout(4096, 32, 32, 8, 14336, 128256), 4, 291, 16_060_522_496),
    "Llama-3-70B": (llama_layout(8192, 80, 64, 8, 28672, 128256), 30, 723, 141_107_412_992),
    "Qwen3-32B": (qwen3_layout(5120, 64, 64, 8, 25600, 151936), 17, 707, 65_524_246_528),
    "Mixtral-8x7B": (mixtral_layout(4096, 32, 32, 8, 14336, 32000), 19, 995, 93_405_585_408),
}
MESHES = [{"tp": 8}, {"tp": 16}, {"tp": 8, "pp": 2}]


@pytest.mark.parametrize("model", PUBLISHED)
def test_one_node_reads_every_byte_once_on_every_mesh(model):
    layout, num_files, num_tensors, total_bytes = PUBLISHED[model]
    index = header_only_index(layout.tensors, num_files=num_files, config=layout.config)
    assert (len(index), index.total_bytes) == (num_tensors, total_bytes)
    for sizes in [*MESHES, {"tp": 8, "ep": 8}, {"tp": 8, "pp": 2, "ep": 8}] if model == "Mixtral-8x7B" else MESHES:
        summary = summarize(_plan(index, ShardRules.for_config(layout.config), num_nodes=1, **sizes))
        assert summary.read_bytes == summary.needed_bytes == total_bytes
    # Stages on nodes of their own share nothing but what each of them needs whole.
    stages = _plan(index, ShardRules.for_config(layout.config), num_nodes=2, tp=8, pp=2)
    assert summarize(stages).read_bytes == total_bytes
    cut = summarize(_plan(index, ShardRules.for_config(layout.config), num_nodes=2, tp=16))
    assert 1.25 < cut.amplification < 1.4


@pytest.mark.slow
def test_nodes_of_deepseek_read_their_own_experts_and_no_other(deepseek):
    rules = ShardRules.for_config(deepseek.config)
    plan = _plan(deepseek, rules, num_nodes=2, tp=16, ep=16)
    by_node = [explain_tensors(plan, rank=8 * node) for node in range(2)]
    for first, second in zip(*(sorted(reads, key=lambda read: read.name) for reads in by_node), strict=True):
        expert = first.name.partition(".experts.")[2].partition(".")[0]
        if not expert or ".layers.61." in first.name:
            continue
        # Scales of 3,584 bytes lie in gaps that are read over; no weight of another node's expert does.
        holder, other = (first, second) if int(expert) < 128 else (second, first)
        assert holder.read_bytes == holder.num_bytes
        assert other.needed_bytes == 0
        assert other.read_bytes == 0 or first.name.endswith("_scale_inv")
    assert summarize(plan).amplification < 1.02
    alone = summarize(_plan(deepseek, rules, num_nodes=1, tp=16, ep=16))
    assert (
        alone.read_bytes
        == alone.needed_bytes
        == sum(read.num_bytes for read in by_node[0] if ".layers.61." not in read.name)
    )
