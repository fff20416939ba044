"""The timeline has the bytes, the blocks and the slots of its traces, whatever the number of its parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ray_streamer.rank.recorder import Step
from ray_streamer.report.timeline import make_timeline
from ray_streamer.storage.base import Incident

MIB = 1 << 20


@pytest.mark.parametrize("num_parts", [1, 7, 150])
@pytest.mark.parametrize("num_slots", [4, 1000])
def test_all_bytes_and_all_time_of_blocks_are_in_it(constructed, num_parts, num_slots):
    load = constructed(num_slots=num_slots, first_byte_seconds=0.05, stream_rate=2e7, copy_seconds=0.01)
    trace = load.trace()
    timeline = make_timeline([trace], num_parts=num_parts)
    (rank,) = timeline.ranks
    assert timeline.seconds == pytest.approx(load.seconds, abs=1e-5)
    assert sum(rank.received_bytes) == sum(rank.landed_bytes) == load.num_blocks * load.block_bytes
    times = trace.spans.times
    for shown, first, last in (
        (rank.waiting_for_slot, Step.QUEUED, Step.ASKED),
        (rank.waiting_for_first_byte, Step.ASKED, Step.FIRST_BYTE),
        (rank.receiving, Step.FIRST_BYTE, Step.LAST_BYTE),
        (rank.copying, Step.TAKEN, Step.LANDED),
        (rank.slots_in_use, Step.ASKED, Step.LANDED),
    ):
        assert sum(shown) * timeline.part_seconds == pytest.approx(
            (times[last] - times[first]).sum(), rel=0.02, abs=0.005
        )
        assert min(shown) >= 0
    assert max(rank.slots_in_use) <= min(num_slots, load.concurrency) + 0.01


def test_each_moment_shows_what_was_done_then(constructed):
    """Rounds of 16 blocks: half a second of waiting for the first byte, then half a second of bytes."""
    load = constructed(num_blocks=32, first_byte_seconds=0.5, stream_rate=2 * MIB, copy_seconds=1e-5)
    (rank,) = make_timeline([load.trace()], num_parts=4).ranks
    assert rank.waiting_for_first_byte == pytest.approx((16, 0, 16, 0), abs=0.02)
    assert rank.receiving == pytest.approx((0, 16, 0, 16), abs=0.02)
    assert rank.received_bytes == pytest.approx((0, 16 * MIB, 0, 16 * MIB), abs=MIB // 100)


def test_ranks_of_a_node_stand_on_one_axis(constructed):
    late = constructed(rank=1, num_ranks=2, device_seconds=1.0).trace()
    early = constructed(rank=0, num_ranks=2).trace()
    timeline = make_timeline([early, late])
    assert [rank.phases[0][:2] for rank in timeline.ranks] == [("stream", 0.0), ("device", 0.0)]
    assert timeline.ranks[1].phases[1][1] == pytest.approx(1.0)
    assert max(stop for rank in timeline.ranks for _, _, stop in rank.phases) == pytest.approx(timeline.seconds)


def test_a_storage_that_tells_first_bytes_at_the_end_receives_from_the_request_on(constructed):
    trace = constructed(first_byte_seconds=0.5, stream_rate=1e9).trace()
    times = trace.spans.times.copy()
    times[Step.FIRST_BYTE] = times[Step.LAST_BYTE]
    (rank,) = make_timeline([replace(trace, spans=replace(trace.spans, times=times))], num_parts=10).ranks
    assert sum(rank.waiting_for_first_byte) == 0
    assert np.count_nonzero(rank.received_bytes) == 10


def test_incidents_stand_at_their_second(constructed):
    trace = constructed().trace()
    began = trace.spans.phases[0].start
    traced = replace(trace, incidents=(Incident("retry", began + 0.25), Incident("hedge", began + 0.5)))
    (rank,) = make_timeline([traced]).ranks
    assert rank.incidents == (("retry", 0.25), ("hedge", 0.5))


def test_ranks_that_did_nothing_have_none(constructed):
    assert make_timeline([]) is None
    trace = constructed().trace()
    assert make_timeline([replace(trace, spans=replace(trace.spans, phases=()))]) is None
