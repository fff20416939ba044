"""The verdict names what bounded a load, and what it predicts for another setting is what a load with that setting takes."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest

from ray_streamer.rank.recorder import Step
from ray_streamer.report.evidence import Evidence, slowest_node
from ray_streamer.report.tables import print_load
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.losses import losses_of
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.report.verdict.observe import observe_node
from ray_streamer.report.verdict.replay import replay_seconds
from ray_streamer.storage.base import Incident, StorageStatistics

SMALL = 256 << 10
"""The smallest block to which a small memory limit leads."""

CLOSE = 0.1
BEGAN = 1000.0


@pytest.fixture
def verdict_on(statistics_of):
    """Judges constructed loads of the ranks of one node."""

    def judged(*loads, traces=None, phases=None, max_bandwidth=None, **counted):
        traces = [load.trace() for load in loads] if traces is None else traces
        asked = RequestedSettings(loads[0].block_bytes, max_bandwidth)
        return judge(traces, [statistics_of(trace, **counted) for trace in traces], asked, phases)

    return judged


def test_a_first_byte_that_comes_late(constructed, verdict_on):
    load = constructed(first_byte_seconds=0.2, stream_rate=50e6)
    verdict = verdict_on(load)
    assert verdict.bound == "first byte"
    assert verdict.measured_seconds == pytest.approx(load.seconds)
    assert verdict.replayed_seconds == pytest.approx(load.seconds, rel=0.01)
    assert verdict.costs[0].seconds == pytest.approx(3 * 0.2, rel=CLOSE)
    assert verdict.advice.settings == {"concurrency": 32}
    assert verdict.advice.seconds == pytest.approx(replace(load, concurrency=32).seconds, rel=CLOSE)
    assert "first byte (median 200 ms)" in verdict.text
    assert f"With concurrency=32: {verdict.advice.seconds:.2f} s instead of {load.seconds:.2f} s." in verdict.text


def test_streams_that_are_slow_each(constructed, verdict_on):
    load = constructed(stream_rate=5e6)
    verdict = verdict_on(load)
    assert verdict.bound == "stream rate"
    assert verdict.advice.settings == {"concurrency": 32}
    assert verdict.advice.seconds == pytest.approx(replace(load, concurrency=32).seconds, rel=CLOSE)
    assert "the rate of each stream from the storage (5 MB/s)" in verdict.text


@pytest.mark.parametrize(
    ("concurrency", "bound", "advised"), [(4, "bandwidth", None), (8, "bandwidth", None), (2, "stream rate", 4)]
)
def test_a_disk_that_few_reads_keep_busy(constructed, verdict_on, concurrency, bound, advised):
    """Each read gets less where more are in flight, but how many would be too many does not show in one load."""
    load = constructed(concurrency=concurrency, stream_rate=25e6, first_byte_seconds=0.0, is_disk=True)
    verdict = verdict_on(load)
    assert verdict.bound == bound
    assert (verdict.advice and verdict.advice.settings) == (advised and {"concurrency": advised})


def test_a_bandwidth_that_all_streams_share(constructed, verdict_on):
    load = constructed(node_rate=40e6)
    verdict = verdict_on(load)
    assert verdict.bound == "bandwidth"
    assert verdict.advice is None
    assert verdict.replayed_seconds == pytest.approx(load.seconds, rel=0.01)
    assert replace(load, concurrency=32).seconds == pytest.approx(load.seconds, rel=CLOSE), "more streams bring nothing"
    assert "40 MB/s" in verdict.text
    assert "No setting changes that" in verdict.text


@pytest.mark.parametrize(
    ("cpu_share", "bound"),
    [(0.2, "bandwidth"), (0.9, "interpreter"), (3.9, "cpu")],
    ids=["idle", "one-cpu-of-four", "all-four-cpus"],
)
def test_what_holds_all_streams_is_told_by_the_cpus_that_were_busy(constructed, verdict_on, cpu_share, bound):
    load = constructed(node_rate=40e6)
    assert verdict_on(load, cpu_seconds=cpu_share * load.seconds).bound == bound


def test_a_bandwidth_that_the_user_asked_for(constructed, verdict_on):
    verdict = verdict_on(constructed(node_rate=40e6), max_bandwidth=40_000_000)
    assert verdict.bound == "max_bandwidth"
    assert "Raise max_bandwidth" in verdict.text


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_staging_memory_for_few_reads(constructed, verdict_on, num_slots):
    load = constructed(num_slots=num_slots, block_bytes=SMALL, first_byte_seconds=0.1)
    verdict = verdict_on(load)
    assert verdict.bound == "slots"
    assert verdict.advice.settings.keys() == {"memory_limit"}
    num_helpful = verdict.advice.settings["memory_limit"] // SMALL
    assert num_helpful == 16
    assert verdict.advice.seconds == pytest.approx(replace(load, num_slots=num_helpful).seconds, rel=CLOSE)
    assert f"{num_slots} slot{'s' if num_slots > 1 else ''} for 16 reads in flight" in verdict.text
    assert 'With memory_limit="4MiB"' in verdict.text


@pytest.mark.parametrize("slow_rank", [0, 1, 3])
def test_one_rank_that_is_slower_than_the_others(constructed, verdict_on, slow_rank):
    loads = [constructed(rank=rank, num_ranks=4, first_byte_seconds=0.02) for rank in range(4)]
    loads[slow_rank] = replace(loads[slow_rank], first_byte_seconds=0.2, copy_seconds=0.02)
    verdict = verdict_on(*loads)
    assert verdict.bound == "straggler"
    named = next(cost for cost in verdict.costs if cost.kind == "straggler")
    assert named.rank == slow_rank
    even = loads[slow_rank - 1].seconds
    assert verdict.measured_seconds - named.seconds == pytest.approx(even, rel=CLOSE)
    assert f"rank {slow_rank}, which was slower" in verdict.text


def with_losses(load, first_bytes, kind="retry"):
    """The trace of a load whose blocks waited for their first bytes because requests failed, or were held back."""
    trace = replace(load, first_bytes=first_bytes).trace()
    usual = load.first_byte_seconds
    incidents = [
        Incident(
            kind,
            float(trace.spans.times[Step.ASKED, block]) + seconds - usual,
            trace.files[0],
            int(trace.starts[block]),
            seconds - usual,
        )
        for block, seconds in first_bytes.items()
    ]
    return replace(trace, incidents=(Incident("throttled", BEGAN), *incidents))


def test_few_answers_that_come_much_later(constructed, verdict_on):
    usual = constructed(first_byte_seconds=0.02)
    verdict = verdict_on(replace(usual, first_bytes={33: 2.0, 39: 3.0}))
    assert verdict.bound == "late answers"
    cost = next(cost for cost in verdict.costs if cost.kind == "late answers")
    assert verdict.measured_seconds - cost.seconds == pytest.approx(usual.seconds, rel=CLOSE)


@pytest.mark.parametrize("kind", ["retry", "held"])
@pytest.mark.parametrize(
    ("storage", "bound"),
    [
        (StorageStatistics(num_throttled=4, num_retries=4), "throttling"),
        (StorageStatistics(num_throttled=1, num_retries=4), "failed requests"),
        (StorageStatistics(num_retries=4), "failed requests"),
    ],
    ids=["throttled", "mostly-failed", "failed"],
)
def test_requests_that_failed(constructed, verdict_on, storage, bound, kind):
    usual = constructed(first_byte_seconds=0.02)
    verdict = verdict_on(usual, traces=[with_losses(usual, {33: 2.0, 39: 3.0}, kind)], storage=storage)
    assert verdict.bound == bound
    cost = next(cost for cost in verdict.costs if cost.kind == bound)
    assert verdict.measured_seconds - cost.seconds == pytest.approx(usual.seconds, rel=CLOSE)
    assert [cost.kind for cost in verdict.costs].count("late answers") == 0
    if bound == "throttling":
        assert "4 answers to slow down" in verdict.text
        assert "concurrency=8" in verdict.text


@pytest.mark.parametrize("num_slow", [2, 4, 12])
def test_waits_after_refusals_that_are_shorter_than_late_answers(constructed, verdict_on, num_slow):
    """Each costs 40 ms, where an answer counts as late from 50 ms on; 5% of 40 blocks, 10%, and 30%."""
    usual = constructed(concurrency=1)
    waits = {block: 0.041 for block in range(0, 40, 40 // num_slow)}
    trace = with_losses(usual, waits)
    throttled = StorageStatistics(num_throttled=num_slow, num_retries=num_slow)
    verdict = verdict_on(usual, traces=[trace], storage=throttled)
    assert verdict.bound == "throttling"
    cost = next(cost for cost in verdict.costs if cost.kind == "throttling")
    assert verdict.measured_seconds - cost.seconds == pytest.approx(usual.seconds, rel=CLOSE)


@pytest.mark.parametrize(("num_lost", "bound"), [(1, "first byte"), (4, "throttling")])
def test_refusals_come_before_what_is_slow_anyway_from_a_tenth_of_the_load_on(constructed, verdict_on, num_lost, bound):
    """First bytes take nine tenths of this load."""
    usual = constructed(first_byte_seconds=0.02, concurrency=1)
    trace = with_losses(usual, {block: 0.06 for block in range(num_lost)})
    verdict = verdict_on(usual, traces=[trace], storage=StorageStatistics(num_throttled=num_lost, num_retries=num_lost))
    assert verdict.bound == bound
    assert verdict.costs[0].kind == "first byte"
    assert verdict.advice is None


def test_failed_requests_that_cost_little_are_told_beside_what_bounded_the_load(constructed, verdict_on):
    usual = constructed(first_byte_seconds=0.2)
    verdict = verdict_on(
        usual, traces=[with_losses(usual, {39: 0.23})], storage=StorageStatistics(num_throttled=1, num_retries=1)
    )
    assert verdict.bound == "first byte"
    assert "(median 200 ms)" in verdict.text
    assert verdict.advice is None, "a store that refuses requests would refuse more of more"
    assert (
        "Beside that, the storage's throttling (1 answer to slow down, and the waits after them) cost 0.03 s."
        in verdict.text
    )


def test_a_body_that_breaks_costs_until_it_goes_on(constructed, verdict_on):
    usual = constructed(stream_rate=5e6, num_blocks=16)
    trace = usual.trace()
    times = trace.spans.times.copy()
    times[Step.LAST_BYTE :, 3] += 1.0
    lost = Incident("retry", float(times[Step.FIRST_BYTE, 3]) + 1.1, trace.files[0], int(trace.starts[3]) + 1000, 1.0)
    trace = replace(trace, spans=replace(trace.spans, times=times), incidents=(lost,))
    verdict = verdict_on(usual, traces=[trace], storage=StorageStatistics(num_retries=1))
    assert verdict.bound == "failed requests"
    cost = next(cost for cost in verdict.costs if cost.kind == "failed requests")
    assert verdict.measured_seconds - cost.seconds == pytest.approx(usual.seconds, rel=0.25)


def test_an_address_of_the_storage_that_is_slower_than_the_others(constructed, verdict_on):
    usual = constructed(stream_rate=5e6, num_blocks=16)
    trace = usual.trace()
    times = trace.spans.times.copy()
    slow = []
    for block in (3, 7, 11, 15):
        times[Step.LAST_BYTE :, block] += 2.0
        ended, offset = float(times[Step.LAST_BYTE, block]), int(trace.starts[block])
        slow.append(Incident("slow address", ended, trace.files[0], offset, 2.0, "10.0.0.9"))
    retry = Incident("retry", BEGAN + 0.1, trace.files[0], 0, 0.001)
    trace = replace(trace, spans=replace(trace.spans, times=times), incidents=(retry, *slow))
    verdict = verdict_on(usual, traces=[trace], storage=StorageStatistics(num_retries=1))
    assert verdict.bound == "slow address"
    cost = next(cost for cost in verdict.costs if cost.kind == "slow address")
    assert verdict.measured_seconds - cost.seconds == pytest.approx(usual.seconds, rel=0.25)
    assert "the storage's address 10.0.0.9, from which bytes came more slowly" in verdict.text
    assert "Look at the server, or the path to it, at 10.0.0.9." in verdict.text


def test_losses_belong_to_the_block_that_was_asked_for(constructed):
    """Other files, blocks that other ranks read, and places in no block at all are none of this read's."""
    trace = constructed(num_ranks=2).trace()
    rows = np.arange(4)
    asked, first = (trace.spans.times[step] for step in (Step.ASKED, Step.FIRST_BYTE))

    def lost(offset, path="model.safetensors", seconds=1.0):
        incident = Incident("retry", float(asked[1]) + 1e-4, path, offset, seconds)
        return losses_of(replace(trace, incidents=(incident,)), rows).before_seconds.tolist()

    begins, ends = int(trace.starts[1]), int(trace.stops[1])
    assert lost(begins, seconds=1e-4) == lost(ends - 1, seconds=1e-4) == [0.0, 1e-4, 0.0, 0.0]
    assert lost(begins) == [0.0, pytest.approx(first[1] - asked[1]), 0.0, 0.0], "never more than the read waited"
    assert lost(ends) == lost(begins, path="other") == lost(begins, path="") == lost(1 << 60) == [0.0] * 4


@pytest.mark.parametrize(
    ("touch_seconds", "bound"), [(0.0, "copies"), (0.008, "first touch")], ids=["used-memory", "fresh-memory"]
)
@pytest.mark.parametrize("is_mapped", [True, False], ids=["page-cache", "read"])
def test_copies_and_the_first_touch_of_memory(constructed, verdict_on, touch_seconds, bound, is_mapped):
    load = constructed(copy_seconds=0.01, touch_seconds=touch_seconds, first_byte_seconds=0.001)
    traces = [load.mapped()] if is_mapped else [load.trace()]
    verdict = verdict_on(load, traces=traces)
    assert verdict.bound == bound
    if bound == "first touch":
        cost = next(cost for cost in verdict.costs if cost.kind == bound)
        without = verdict.measured_seconds - cost.seconds
        quick = replace(load, copy_seconds=0.002, touch_seconds=0.0)
        assert without == pytest.approx(40 * 0.002 if is_mapped else quick.seconds, rel=CLOSE)
        assert "model.reload()" in verdict.text


def test_reads_that_wait_for_the_device(constructed, verdict_on):
    load = constructed(num_blocks=32, num_slots=16, device_seconds=2.0, first_byte_seconds=0.01)
    verdict = verdict_on(load)
    assert verdict.bound == "device"
    assert verdict.replayed_seconds == pytest.approx(load.seconds, rel=0.02)
    without = replace(load, device_seconds=0.0).seconds
    assert verdict.measured_seconds - verdict.costs[0].seconds == pytest.approx(without, rel=CLOSE)


def test_what_came_before_the_first_read_is_told_first(constructed, verdict_on):
    phases = {"check": 0.01, "ray": 2.0, "start": 6.0, "plan": 0.1, "import": 0.0, "load": 0.7, "total": 8.81}
    verdict = verdict_on(constructed(first_byte_seconds=0.2), phases=phases)
    assert verdict.text.startswith(
        "Of 8.81 s, 8.11 s passed before the first read: 6.00 s the start of the ranks' processes, 2.00 s Ray's"
    )
    assert verdict.bound == "first byte", "what bounded reading and copying"
    quick = verdict_on(constructed(first_byte_seconds=0.2), phases={"start": 0.01, "load": 0.7, "total": 0.71})
    assert quick.text.startswith("Reading and copying took")


def test_a_load_of_which_nothing_is_known_has_no_verdict(constructed, statistics_of):
    assert observe_node([]) is None
    trace = constructed(num_blocks=0).trace()
    assert observe_node([trace]) is None
    found = Evidence([trace], RequestedSettings(1 << 20)).findings([statistics_of(trace)], {})
    assert (found.verdict, found.untold) == (None, ("Nothing was read or copied, so nothing bounded the load.",))


@pytest.mark.parametrize("concurrency", [2, 16])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_replay_without_changes_takes_what_the_load_took(constructed, concurrency, num_ranks):
    loads = [
        constructed(
            rank=rank,
            num_ranks=num_ranks,
            concurrency=concurrency,
            first_byte_seconds=0.03,
            stream_rate=1e8,
            copy_seconds=0.004,
        )
        for rank in range(num_ranks)
    ]
    observed = observe_node([load.trace() for load in loads])
    assert replay_seconds(observed.model) == pytest.approx(observed.measured_seconds, rel=0.01)


def test_a_long_load_is_replayed_in_part(constructed):
    load = constructed(num_blocks=20_000, first_byte_seconds=0.03, stream_rate=1e8)
    observed = observe_node([load.trace()])
    assert observed.model.thinning == math.ceil(20_000 / 8000)
    assert sum(len(rank.reads) for rank in observed.model.ranks) <= 8000
    assert replay_seconds(observed.model) == pytest.approx(load.seconds, rel=0.02)


def test_a_verdict_is_found_once_and_its_evidence_let_go_then(constructed, statistics_of):
    trace = constructed(first_byte_seconds=0.2).trace()
    evidence = Evidence([trace], RequestedSettings(1 << 20))
    traces = weakref.ref(trace.spans.times)
    ranks = [statistics_of(trace), replace(statistics_of(trace), rank=1)]
    del trace
    first = evidence.findings(ranks, {})
    assert first.verdict.bound == "first byte"
    assert first.untold == ()
    assert evidence.findings(ranks, {}) is first
    gc.collect()
    assert traces() is None


def test_the_node_that_took_longest_is_judged(constructed, statistics_of):
    loads = [constructed(rank=rank, first_byte_seconds=0.1 + (rank == 2)) for rank in range(4)]
    ranks = [statistics_of(load.trace()) for load in loads]
    assert slowest_node([(0, 1), (2, 3)], ranks) == (2, 3)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({"touch_seconds": None}, id="no page faults"),
        pytest.param({"ways": None}, id="no ways"),
    ],
)
def test_a_verdict_that_fails_costs_a_sentence_and_no_report(constructed, report_on, damage, capsys):
    trace = constructed(first_byte_seconds=0.2).trace()
    report = report_on(replace(trace, spans=replace(trace.spans, **damage)))
    said = report.as_dict()
    assert said["verdict"] is None
    (sentence,) = said["untold"]
    assert sentence.startswith("No word on what bounded the load: a fault of ray_streamer, not of the load (")
    print_load(report)
    assert sentence[:60] in capsys.readouterr().out


def test_time_between_copies_out_of_the_page_cache_is_replayed_too(constructed):
    """As on a machine whose CPUs do other work in between."""
    load = constructed(num_blocks=20, copy_seconds=0.01)
    trace = load.mapped()
    times = trace.spans.times.copy()
    for step in (Step.TAKEN, Step.LANDED):
        times[step] += 0.005 * np.arange(1, 21)
    observed = observe_node([replace(trace, spans=replace(trace.spans, times=times))])
    assert observed.measured_seconds == pytest.approx(20 * 0.015)
    assert replay_seconds(observed.model) == pytest.approx(20 * 0.015, rel=0.01)


def test_a_rank_that_is_slow_at_times_is_a_straggler(constructed, verdict_on):
    """Its usual copy takes what those of others take; one in eight is held up."""
    quick, slow = (constructed(rank=rank, num_ranks=2, num_blocks=64, copy_seconds=0.002) for rank in (0, 1))
    trace = slow.mapped()
    times = trace.spans.times.copy()
    held_up = np.cumsum(np.where(np.arange(64) % 8 == 7, 0.05, 0.0))
    times[Step.LANDED] += held_up
    times[Step.TAKEN, 1:] += held_up[:-1]
    verdict = verdict_on(quick, traces=[quick.mapped(), replace(trace, spans=replace(trace.spans, times=times))])
    assert verdict.bound == "straggler"
    named = next(cost for cost in verdict.costs if cost.kind == "straggler")
    assert (named.rank, named.seconds) == (1, pytest.approx(8 * 0.05, rel=0.05))
