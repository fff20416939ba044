"""Clocks of two machines, where one of them is invented: how far it is from ours is known, and must be found within the error."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.cluster.clocks import ClockReading, measure_offset, read_clock


def test_one_machine_has_one_clock():
    assert measure_offset(read_clock) == (0.0, 0.0)


@given(
    ahead=st.floats(-1e7, 1e7),
    delays=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=8, max_size=8),
)
def test_the_offset_is_right_to_its_error_and_the_quickest_answer_decides(ahead, delays):
    now = [1000.0]
    left = list(delays)

    def ask() -> ClockReading:
        there, back = left.pop()
        now[0] += there
        reading = ClockReading("another machine", now[0] + ahead)
        now[0] += back
        return reading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        offset = measure_offset(ask)
    assert abs(offset.seconds - ahead) <= offset.error_seconds + 1e-6
    assert offset.error_seconds == pytest.approx(min(there + back for there, back in delays) / 2, abs=1e-6)
