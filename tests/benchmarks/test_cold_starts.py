"""Simulated cold starts read what their way of loading reads, and the page says what was simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cold_starts.measured import Checked, predict
from cold_starts.page import duration, size, write_page
from cold_starts.scenarios import GPU_NODE, S3, Model
from cold_starts.small_cases import MIB, SMALL
from cold_starts.strategies import STRATEGIES, Case, cluster_of, storage_bytes
from cold_starts.studies import SHOWN_NODES, Excerpt, Setting, Simulated, Start, Straggler, with_slow_node

from ray_streamer.doctor.memory_speed import MemorySpeed
from ray_streamer.report.verdict.replay import replay_cluster
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.layouts import llama_layout
from ray_streamer.testing.plan_inputs import header_only_index

NUM_GPUS = GPU_NODE.num_gpus
BY_SHARING = {strategy.sharing: strategy for strategy in STRATEGIES}
FAST = MemorySpeed(
    copy_bytes_per_second=1e10, touch_bytes_per_second=1e10, exchange_seconds=1e-5, gpu_bytes_per_second=None
)


@pytest.fixture(scope="module")
def model():
    """About 1.6 GB."""
    layout = llama_layout(2048, 16, 16, 8, 8192, 32000)
    return Model(name="small", index=header_only_index(layout.tensors, num_files=4, config=layout.config))


@pytest.fixture
def case_of(model):
    return lambda sharing, num_nodes=1: Case(
        model=model, storage=S3, machine=GPU_NODE, strategy=BY_SHARING[sharing], num_nodes=num_nodes
    )


@pytest.mark.parametrize("num_nodes", [1, 8, 1024])
@pytest.mark.parametrize(
    ("sharing", "times"),
    [
        ("none", lambda number: number * NUM_GPUS),
        ("broadcast", lambda number: number),
        ("slices", lambda number: number),
        ("cluster", lambda _: 1),
        ("fabric", lambda _: 1),
    ],
    ids=["none", "broadcast", "slices", "cluster", "fabric"],
)
def test_the_replay_reads_what_the_way_of_loading_reads(case_of, model, sharing, times, num_nodes):
    case = case_of(sharing, num_nodes)
    expected = times(num_nodes) * model.index.total_bytes
    assert storage_bytes(case) == pytest.approx(expected, rel=0.01), "what the page says"
    cluster = cluster_of(case)
    replayed = sum(
        group.num_nodes * group.node.thinning * sum(read.work_bytes for rank in group.node.ranks for read in rank.reads)
        for group in cluster.groups
    )
    assert replayed == pytest.approx(expected, rel=0.02), "what the simulation does"


def test_who_reads_more_of_a_storage_that_is_shared_takes_longer(case_of):
    """Sixty-four nodes at a prefix of S3: eight times the bytes take eight times as long, and once for all takes least."""
    seconds = {sharing: replay_cluster(cluster_of(case_of(sharing, 64)))[0] for sharing in BY_SHARING}
    assert seconds["none"] / seconds["slices"] == pytest.approx(NUM_GPUS, rel=0.2)
    assert seconds["broadcast"] == pytest.approx(seconds["slices"], rel=0.2)
    assert seconds["fabric"] <= seconds["cluster"] < seconds["slices"]


@pytest.mark.parametrize(("sharing", "waits"), [("slices", False), ("cluster", True), ("fabric", True)])
def test_nodes_that_read_for_each_other_wait_for_a_slow_one(case_of, sharing, waits):
    cluster = cluster_of(case_of(sharing, 4))
    (usual,) = replay_cluster(cluster)
    others, slow = replay_cluster(with_slow_node(cluster, 0.02))
    assert slow > 1.5 * usual
    assert (others > 1.5 * usual) == waits


@pytest.mark.parametrize("small", SMALL, ids=[small.name for small in SMALL])
def test_what_small_loads_are_predicted_to_take(small, tmp_path):
    """At least what each of their limits alone takes, and little more than all of them one after the other."""
    folder = write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 4096))])
    num_bytes = 8 * MIB
    total = num_bytes * small.num_apart * small.num_nodes
    at_once = min(small.concurrency, small.num_slots) * small.num_ranks
    rounds = -(-num_bytes // (small.block_bytes * at_once))
    slowest_link = min((small.node_rate(node) or 1e12 for node in range(small.num_nodes)), default=1e12)
    alone = [
        rounds * small.first_byte_seconds,
        num_bytes / at_once / (small.stream_rate or 1e12),
        total / (small.storage_rate or 1e12),
        num_bytes * small.num_apart / slowest_link,
    ]
    # Files are cut on a grid that their headers shift, which may take one more round.
    more = small.first_byte_seconds + small.block_bytes / (small.stream_rate or 1e12)
    late = small.late[1] * (1 + num_bytes // small.block_bytes // small.late[0]) if small.late else 0.0
    predicted = predict(small, str(folder), FAST)
    assert max(alone) * 0.999 <= predicted <= 1.3 * (sum(alone) + more) + late


def test_the_page_says_what_was_simulated():
    starts = tuple(
        Start(
            model=name,
            storage=storage,
            strategy=strategy.name,
            num_nodes=number,
            seconds=1.5 * number + place,
            storage_bytes=number * 1_000_000_000,
            bound="storage" if number > 1 else "first byte",
        )
        for name in ("A", "B")
        for storage in ("S3, one prefix", "Lustre, 100 GB/s")
        for place, strategy in enumerate(STRATEGIES)
        for number in SHOWN_NODES
    )
    page = write_page(
        Simulated(
            starts=starts,
            settings=(Setting(link_gbit=100, concurrency=16, seconds=4321.0, bound="first byte"),),
            stragglers=(Straggler(strategy="one", usual_seconds=1.0, others_seconds=2.0, slow_seconds=33.0),),
            excerpts=(Excerpt(num_nodes=8, seconds=10.0, whole_seconds=10.2),),
        ),
        [
            Checked(name="right", predicted_seconds=1.1, measured_seconds=(0.9, 1.0, 1.2)),
            Checked(name="wrong", predicted_seconds=2.0, measured_seconds=(0.9, 1.0, 1.2)),
        ],
        "2 CPUs.",
    )
    for start in starts:
        assert f"{duration(start.seconds)}, {start.bound}" in page
    assert f"| {size(64_000_000_000)} |" in page
    assert "| right | 1.10 s | 1.00 s (0.90 to 1.20) | +10% |" in page
    assert "**1 of 2** are within it" in page
    assert "72 min, first byte" in page
    assert "10.0 s in place of 10.2 s on 8 nodes" in page
    assert "with 8 nodes or more" in page
