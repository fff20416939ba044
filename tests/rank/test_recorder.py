"""What a load takes down of each block: the steps of its way, in their order, on one clock; figures are sums of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ray_streamer.errors import ShortReadError
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.block_source import Way
from ray_streamer.rank.recorder import Recorder, Step
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    from ray_streamer.rank.load import RankLoad

BLOCK = 4096
BUSY_SECONDS = 0.02
STEPS = {
    Way.MAPPED: (Step.TAKEN, Step.LANDED),
    Way.OFFERED: (Step.ANNOUNCED, Step.TAKEN, Step.LANDED),
    Way.DIRECT: (Step.ASKED, Step.FIRST_BYTE, Step.LAST_BYTE, Step.LANDED),
    Way.STAGED: (Step.QUEUED, Step.ASKED, Step.FIRST_BYTE, Step.LAST_BYTE, Step.ANNOUNCED, Step.TAKEN, Step.LANDED),
}
"""Of each way, in the order of time; a block that nobody else wants is not announced."""


@dataclass
class Loaded:
    plan: object
    loads: list[RankLoad]


@pytest.fixture
def loaded(ranks, tmp_path) -> Loaded:
    """Two ranks: a file that both copy from its mapping, a tensor that both want, and one for each of them alone."""
    specs = [("shared", "U8", (10 * BLOCK,)), ("first", "U8", (6 * BLOCK,)), ("second", "U8", (7 * BLOCK,))]
    folder = ranks.write(tmp_path, [[("mapped", "U8", (5 * BLOCK,))], specs])
    slices = {
        "mapped": (TensorPart.whole((5 * BLOCK,)),) * 2,
        "shared": (TensorPart.whole((10 * BLOCK,)),) * 2,
        "first": (TensorPart.whole((6 * BLOCK,)), None),
        "second": (None, TensorPart.whole((7 * BLOCK,))),
    }
    plan = ranks.plan(str(folder), slices, topology=Topology.even(2), block_bytes=BLOCK)
    running = ranks.prepare(plan, memory_limit=2 * BLOCK, resident_paths=["00000.safetensors"])
    running.start().tensors()
    return Loaded(plan, running.loads)


def test_every_block_takes_the_steps_of_its_way_in_order(loaded):
    for load in loaded.loads:
        spans = load.spans()
        assert set(np.unique(spans.ways)) >= {*Way}
        for block, way in enumerate(spans.ways.tolist()):
            taken = [step for step in Step if spans.times[step, block]]
            expected = [step for step in STEPS[Way(way)] if step is not Step.ANNOUNCED] if way else []
            assert [step for step in taken if step is not Step.ANNOUNCED] == expected
            times = [spans.times[step, block] for step in (STEPS[Way(way)] if way else ()) if step in taken]
            assert times == sorted(times)


def test_what_is_offered_was_read_before_by_the_clock_of_the_other_rank(loaded):
    spans = [load.spans() for load in loaded.loads]
    readers = loaded.plan.node_plans[0].readers
    offered = [np.flatnonzero(each.ways == Way.OFFERED) for each in spans]
    assert sum(map(len, offered)) >= 10
    for rank, blocks in enumerate(offered):
        for block in blocks.tolist():
            reader = spans[int(readers[block])]
            assert readers[block] != rank
            assert reader.times[Step.ANNOUNCED, block] > 0
            assert reader.times[Step.LAST_BYTE, block] <= spans[rank].times[Step.ANNOUNCED, block]


def test_figures_are_sums_of_the_steps(loaded):
    blocks = loaded.plan.node_plans[0].blocks
    sizes = blocks.stops - blocks.starts
    for load in loaded.loads:
        spans, statistics = load.spans(), load.statistics()
        times, is_read = spans.times, spans.times[Step.LAST_BYTE] > 0
        assert statistics.bytes_delivered == statistics.bytes_to_deliver == spans.landed_bytes.sum()
        assert statistics.page_cache_bytes == 5 * BLOCK
        assert statistics.bytes_read == sizes[is_read].sum()
        assert statistics.direct_bytes == sizes[is_read & (spans.ways == Way.DIRECT)].sum() > 0
        assert statistics.num_requests == is_read.sum()
        assert statistics.read_seconds == pytest.approx((times[Step.LAST_BYTE] - times[Step.ASKED]).sum(), abs=1e-5)
        staged = spans.ways == Way.STAGED
        waited = (times[Step.ASKED] - times[Step.QUEUED])[staged].sum()
        assert statistics.wait_seconds == pytest.approx(waited, abs=1e-5)
        assert 0 < statistics.first_byte_seconds <= statistics.read_seconds
        assert statistics.copy_seconds > 0
        # Blocks of this size are touched by their copies.
        assert statistics.first_touch_seconds == 0
        names = [phase.name for phase in spans.phases]
        # The device was there before the load.
        assert names == ["connect", "stream", "finish"]
        assert {name for name, seconds in statistics.seconds.items() if seconds} == set(names)
        assert all(before.stop <= after.start for before, after in zip(spans.phases, spans.phases[1:], strict=False))
    read = sum(load.statistics().bytes_read for load in loaded.loads)
    assert read == sum(sizes[blocks.file_ids == 1])


def test_a_read_that_fails_was_asked_and_never_came(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("large", "U8", (8 * BLOCK,))]])
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((8 * BLOCK,)),)}, topology=Topology.even(1))

    def fail(path, extent, count) -> None:
        if count == 3:
            began = time.thread_time()
            while time.thread_time() < began + BUSY_SECONDS:
                pass
            raise ShortReadError("too short")

    running = ranks.prepare(plan, concurrency=1, is_staged=True, before_read={0: fail}).start()
    (outcome,) = running.join()
    assert isinstance(outcome, ShortReadError)
    spans, statistics = running.loads[0].spans(), running.loads[0].statistics()
    assert spans.reached(Step.ASKED).sum() == 3
    assert spans.reached(Step.LAST_BYTE).sum() == statistics.num_requests == 2
    assert statistics.bytes_delivered < statistics.bytes_to_deliver
    assert statistics.cpu_seconds > 0.9 * BUSY_SECONDS


def test_steps_of_blocks_cost_a_known_number_of_bytes():
    spans = Recorder(1000).spans()
    columns = (spans.times, spans.ways, spans.landed_bytes, spans.touch_seconds)
    assert sum(column.nbytes for column in columns) == 1000 * (7 * 8 + 1 + 8 + 4)
    assert spans.seconds_between(Step.ASKED, Step.LAST_BYTE) == 0
    assert spans.seconds_in("stream") == 0
