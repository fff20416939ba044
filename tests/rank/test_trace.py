"""A load on the time axis: all of every block's life, on one clock, in a form that viewers of traces read."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.errors import ClusterError
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.trace import ClockOffset, LoadTrace, epoch_of_this_clock
from ray_streamer.report.verdict.cost import find_model_costs
from ray_streamer.report.verdict.observe import observe_node
from ray_streamer.report.verdict.replay import replay_seconds
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096
NUM_BLOCKS = 12
PARTS = {"wait for a slot", "wait for the first byte", "receive"}


@pytest.fixture
def plan(ranks, tmp_path):
    """Two nodes of two ranks, which all want one tensor; a rank alone on a third one has a part of another file."""
    shape = (NUM_BLOCKS * BLOCK,)
    folder = ranks.write(tmp_path, [[("shared", "U8", shape)], [("alone", "U8", (3 * BLOCK,))]])
    slices = {
        "shared": (*(TensorPart.whole(shape),) * 4, None),
        "alone": (*(None,) * 4, TensorPart.whole((3 * BLOCK,))),
    }
    return ranks.plan(str(folder), slices, topology=Topology(((0, 1), (2, 3), (4,))), block_bytes=BLOCK)


@pytest.fixture
def trace(ranks, plan) -> LoadTrace:
    began = time.perf_counter()
    running = ranks.prepare(plan, memory_limit=2 * BLOCK)
    running.start().tensors()
    return LoadTrace(
        uri=plan.index.uri,
        phases=(("start", began, began + 1e-6), ("load", began + 1e-6, time.perf_counter())),
        ranks=tuple(load.trace() for load in running.loads),
        offsets=(ClockOffset(0.0, 0.0),) * 5,
        epoch_seconds=epoch_of_this_clock(),
    )


def test_a_trace_crosses_to_another_rank_whole(trace, tmp_path):
    crossed = dataclasses.replace(trace, ranks=tuple(RankTrace.from_bytes(part.to_bytes()) for part in trace.ranks))
    assert read_back(crossed, tmp_path / "crossed.json") == read_back(trace, tmp_path / "trace.json")


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"no trace at all", lambda data: data[: len(data) // 2]]
)
def test_what_is_no_trace_is_refused(trace, damage):
    with pytest.raises(ClusterError, match="something else than its trace"):
        RankTrace.from_bytes(damage(trace.ranks[0].to_bytes()))


def read_back(trace: LoadTrace, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    trace.write(path)
    written = json.loads(path.read_text())
    return written, written["traceEvents"]


def blocks_of(events: list[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == category and event["name"].startswith("block ")]


def test_each_block_is_read_once_on_each_node_and_copied_by_each_rank_that_wants_it(trace, plan, tmp_path):
    _, events = read_back(trace, tmp_path / "trace.json")
    for node, ranks in enumerate(plan.topology.nodes):
        reads = [event for event in blocks_of(events, "read") if event["pid"] in ranks]
        blocks = plan.node_plans[plan.node_plan_ids[node]].blocks
        extents = sorted((event["args"]["start"], event["args"]["stop"]) for event in reads)
        assert extents == sorted(zip(blocks.starts.tolist(), blocks.stops.tolist(), strict=True))
    for rank in range(4):
        arrived = {
            event["name"]: event["args"]["bytes into this rank's tensors"]
            for event in blocks_of(events, "read") + blocks_of(events, "copy")
            if event["pid"] == rank and (event["cat"] == "copy" or event["args"]["way"] == "direct")
        }
        assert sum(arrived.values()) == NUM_BLOCKS * BLOCK
    assert {event["args"]["file"] for event in blocks_of(events, "read") if event["pid"] == 4} == {"00001.safetensors"}


def test_spans_of_a_lane_follow_each_other_or_lie_within(trace, tmp_path):
    _, events = read_back(trace, tmp_path / "trace.json")
    lanes: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert set(lanes) <= named
    assert {lane for process, lane in lanes if lane in (0, process)} == {process for process, _ in lanes}, "phases"
    dates = [event[key] for event in events for key in ("ts", "dur") if key in event]
    assert all(isinstance(date, int) for date in dates), "a viewer that keeps fewer digits than these sees overlaps"
    for spans in lanes.values():
        outer = sorted(span for span in spans if span[2] not in PARTS)
        assert all(before[1] <= after[0] for before, after in pairwise(outer))
        for start, stop, name in spans:
            if name in PARTS:
                assert any(first <= start <= stop <= last for first, last, _ in outer)


def test_what_ranks_do_lies_within_their_phases_and_those_within_the_drivers(trace, tmp_path):
    _, events = read_back(trace, tmp_path / "trace.json")
    phases = {(event["pid"], event["name"]): event for event in events if event.get("cat") == "phase"}
    load = phases[5, "load"]
    assert abs(load["ts"] / 1e6 - time.time()) < 3600, "the axis is the date"
    for rank in range(5):
        stream = phases[rank, "stream"]
        assert load["ts"] <= stream["ts"]
        assert stream["ts"] + stream["dur"] <= load["ts"] + load["dur"]
        for event in blocks_of(events, "read") + blocks_of(events, "copy"):
            if event["pid"] == rank:
                assert stream["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= stream["ts"] + stream["dur"]


def test_arrows_lead_from_reads_to_copies_of_other_ranks_of_the_node(trace, plan, tmp_path):
    _, events = read_back(trace, tmp_path / "trace.json")
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    num_blocks = len(plan.node_plans[plan.node_plan_ids[0]].blocks)
    assert len(ends) == 2 * num_blocks, "one rank of each node reads a block, the other one takes it"
    spans = blocks_of(events, "read") + blocks_of(events, "copy")
    for number, start in starts.items():
        end = ends[number]
        assert start["pid"] != end["pid"]
        assert start["pid"] // 2 == end["pid"] // 2
        assert start["ts"] <= end["ts"]
        names = [
            event["name"]
            for arrow in (start, end)
            for event in spans
            if (event["pid"], event["tid"]) == (arrow["pid"], arrow["tid"])
            and event["ts"] <= arrow["ts"] <= event["ts"] + event["dur"]
        ]
        assert len(set(names)) == 1
        assert len(names) >= 2


def test_slots_in_use_never_exceed_the_limit_and_are_all_given_back(trace, tmp_path):
    _, events = read_back(trace, tmp_path / "trace.json")
    counters: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["pid"]].append((event["ts"], event["args"]["slots"]))
    assert set(counters) <= {0, 1, 2, 3}
    for counts in counters.values():
        assert counts == sorted(counts, key=lambda count: count[0])
        assert counts[-1][1] == 0
        assert 1 <= max(slots for _, slots in counts) <= 2


def test_another_clock_is_put_right_and_its_error_told(trace, tmp_path):
    """Node 1's clock is an hour ahead; its blocks still lie within the driver's load."""
    ahead = 3600.0
    spans = [
        dataclasses.replace(
            rank.spans,
            times=rank.spans.times + ahead * (rank.spans.times > 0),
            phases=tuple(
                phase._replace(start=phase.start + ahead, stop=phase.stop + ahead) for phase in rank.spans.phases
            ),
        )
        for rank in trace.ranks[2:4]
    ]
    moved = [dataclasses.replace(rank, spans=span) for rank, span in zip(trace.ranks[2:4], spans, strict=True)]
    other = dataclasses.replace(
        trace,
        ranks=(*trace.ranks[:2], *moved, trace.ranks[4]),
        offsets=tuple(ClockOffset(ahead, 0.0012) if rank in (2, 3) else ClockOffset(0.0, 0.0) for rank in range(5)),
    )
    written, events = read_back(other, tmp_path / "moved.json")
    _, expected = read_back(trace, tmp_path / "trace.json")
    assert written["otherData"]["clock_error_microseconds"] == {"node-0": 0, "node-1": 1200, "node-2": 0}
    assert len(events) == len(expected)
    times = [sorted(event["ts"] for event in each if "ts" in event) for each in (events, expected)]
    assert times[0] == pytest.approx(times[1], abs=2.0)


def test_each_node_of_a_real_load_can_be_judged(trace, plan):
    """Ranks that read for each other, and one that reads straight into its tensor."""
    for node in plan.topology.nodes:
        traces = [trace.ranks[rank] for rank in node]
        observed = observe_node(traces)
        replayed = replay_seconds(observed.model)
        assert replayed > 0
        num_reads = sum(len(rank.reads) for rank in observed.model.ranks)
        assert num_reads == len(plan.node_plans[plan.node_plan_ids[plan.topology.node_of(node[0])]].blocks)
        for cost in find_model_costs(observed.model, replayed):
            assert 0 < cost.seconds <= replayed
