"""Replayed loads, of one node or many, take what arithmetic says, and never less than any one resource allows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_streamer.report.verdict.flows import Flows, Lane, fair_rates
from ray_streamer.report.verdict.model import ClusterModel, CopyModel, FanOut, NodeGroup, NodeModel, RankModel, Read
from ray_streamer.report.verdict.replay import replay_cluster, replay_seconds
from ray_streamer.report.verdict.without import without_straggler

BLOCK = 1_000_000
FEW = settings(max_examples=40, deadline=None)
EXACT = 1e-9


def node(
    *,
    num_ranks=2,
    num_reads=12,
    num_readers=3,
    num_slots=1000,
    first_byte_seconds=0.0,
    copy_seconds=0.0,
    stream_rate=math.inf,
    node_rate=math.inf,
):
    """Ranks that each read as many blocks, of which every rank copies a part."""

    def read(rank, number):
        copies = tuple(CopyModel(other, copy_seconds) for other in range(num_ranks) if other != rank)
        start = (number * num_ranks + rank) * BLOCK
        own = CopyModel(rank, copy_seconds)
        return Read(0, start, start + BLOCK, rank, True, 0.0, first_byte_seconds, float(BLOCK), own, copies)

    ranks = tuple(
        RankModel(
            rank=rank,
            begin_seconds=0.0,
            ready_seconds=0.0,
            num_readers=num_readers,
            num_slots=num_slots,
            num_copiers=2,
            reads=tuple(read(rank, number) for number in range(num_reads)),
        )
        for rank in range(num_ranks)
    )
    return NodeModel(ranks=ranks, stream_rate=stream_rate, node_rate=node_rate, block_bytes=BLOCK)


def bytes_of(model):
    return sum(read.num_bytes for rank in model.ranks for read in rank.reads)


RATES = st.sampled_from([0.3e6, 1e6, 3e6, 10e6, 100e6, math.inf])
NODES = st.builds(
    node,
    num_ranks=st.integers(1, 3),
    num_reads=st.integers(1, 10),
    num_readers=st.integers(1, 4),
    num_slots=st.integers(1, 4),
    first_byte_seconds=st.sampled_from([0.0, 0.1, 1.0]),
    copy_seconds=st.sampled_from([0.0, 0.05]),
    stream_rate=RATES,
    node_rate=RATES,
)


@st.composite
def networks(draw):
    num_links = draw(st.integers(1, 3))
    weights = st.floats(0.25, 4.0)
    some = st.dictionaries(st.integers(0, num_links - 1), weights, min_size=1)
    rates = st.one_of(st.floats(0.1, 100.0), st.just(math.inf))
    lanes = draw(st.lists(st.builds(lambda rate, links: Lane(rate, tuple(links.items())), rates, some), min_size=1))
    counts = draw(st.lists(st.integers(0, 5), min_size=len(lanes), max_size=len(lanes)))
    return lanes, draw(st.lists(st.floats(0.1, 100.0), min_size=num_links, max_size=num_links)), counts


@FEW
@given(networks())
def test_no_stream_could_have_more_without_another_that_has_no_more_getting_less(network):
    """Which is what max-min fair means: each is as fast as it can be, or held by a full link on which nobody is faster."""
    lanes, capacities, counts = network
    rates = fair_rates(lanes, capacities, counts)
    loads = [0.0] * len(capacities)
    fastest = [0.0] * len(capacities)
    for lane, rate, count in zip(lanes, rates, counts, strict=True):
        for link, weight in lane.links:
            loads[link] += weight * count * rate
            fastest[link] = max(fastest[link], rate if count else 0.0)
    assert all(load <= capacity * (1 + EXACT) for load, capacity in zip(loads, capacities, strict=True))
    for lane, rate, count in zip(lanes, rates, counts, strict=True):
        if not count:
            assert rate == 0.0
        elif rate < lane.stream_rate * (1 - EXACT):
            assert any(
                loads[link] >= capacities[link] * (1 - EXACT) and rate >= fastest[link] * (1 - EXACT)
                for link, _ in lane.links
            )


@FEW
@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(1.0, 50.0)), min_size=1, max_size=20), st.floats(0.5, 50.0))
def test_a_link_that_is_never_idle_serves_all_bytes_at_its_rate(begins, rate):
    """Whoever begins when: what has come is what the link can bring in the time that somebody received."""
    flows: Flows[float] = Flows([Lane(math.inf, ((0, 1.0),))], [rate])
    ended = []
    for begin, size in sorted(begins):
        while flows.ends_at <= begin:
            ended.append(flows.ends_at)
            flows.end()
        flows.begin(0, size, size, now=begin)
    while flows.ends_at < math.inf:
        ended.append(flows.ends_at)
        flows.end()
    idle, busy_until = 0.0, 0.0
    for begin, size in sorted(begins):
        idle += max(0.0, begin - busy_until)
        busy_until = max(busy_until, begin) + size / rate
    assert ended == sorted(ended)
    assert len(ended) == len(begins)
    assert ended[-1] - idle == pytest.approx(sum(size for _, size in begins) / rate)


@pytest.mark.parametrize(
    ("changed", "seconds"),
    [
        pytest.param({"node_rate": 4e6}, 24 / 4, id="the node's link"),
        pytest.param({"stream_rate": 2e6}, 24 / (2 * 3 * 2), id="each stream"),
        pytest.param({"first_byte_seconds": 0.5}, 4 * 0.5, id="first bytes, in rounds of as many as there are readers"),
        pytest.param({"first_byte_seconds": 0.5, "stream_rate": 2e6}, 4 * (0.5 + 0.5), id="first bytes and streams"),
        pytest.param({"first_byte_seconds": 0.5, "num_slots": 1}, 12 * 0.5, id="one slot"),
        pytest.param({"node_rate": 4e6, "stream_rate": 0.5e6}, 24 / (0.5 * 3 * 2), id="the smaller of two rates"),
    ],
)
def test_one_limit_alone_is_a_division(changed, seconds):
    assert replay_seconds(node(**changed)) == pytest.approx(seconds)


@pytest.mark.parametrize("num_nodes", [1, 3, 1024])
@pytest.mark.parametrize(
    ("storage_rate", "node_rate"),
    [(6e6, math.inf), (6e6, 4e6), (1e12, 4e6)],
    ids=["the-storage", "either", "the-nodes"],
)
def test_nodes_share_what_the_storage_serves(num_nodes, storage_rate, node_rate):
    one = node(node_rate=node_rate)
    cluster = ClusterModel(groups=(NodeGroup(one, num_nodes),), storage_rate=storage_rate)
    expected = max(num_nodes * bytes_of(one) / storage_rate, bytes_of(one) / node_rate)
    assert replay_cluster(cluster) == (pytest.approx(expected),)


@FEW
@given(st.lists(st.tuples(NODES, st.integers(1, 5)), min_size=1, max_size=3), RATES)
def test_no_load_is_faster_than_any_one_resource_allows(groups, storage_rate):
    cluster = ClusterModel(groups=tuple(NodeGroup(*group) for group in groups), storage_rate=storage_rate)
    seconds = replay_cluster(cluster)
    for (model, _), took in zip(groups, seconds, strict=True):
        assert took >= bytes_of(model) / model.node_rate * (1 - EXACT)
        for rank in model.ranks:
            at_once = min(rank.num_readers, rank.num_slots)
            rounds = math.ceil(len(rank.reads) / at_once)
            assert took >= rounds * (rank.reads[0].first_byte_seconds + BLOCK / model.stream_rate) * (1 - EXACT)
    total = sum(number * bytes_of(model) for model, number in groups)
    assert max(seconds) >= total / storage_rate * (1 - EXACT)


@FEW
@given(
    NODES.filter(lambda model: len(model.ranks) == 1),
    st.integers(1, 4),
    RATES,
    st.sampled_from(["stream", "node", "storage"]),
)
def test_a_faster_resource_makes_no_load_slower(model, num_nodes, storage_rate, which):
    before = replay_cluster(ClusterModel(groups=(NodeGroup(model, num_nodes),), storage_rate=storage_rate))
    faster = replace(
        model,
        stream_rate=model.stream_rate * (2 if which == "stream" else 1),
        node_rate=model.node_rate * (2 if which == "node" else 1),
    )
    more = storage_rate * (2 if which == "storage" else 1)
    after = replay_cluster(ClusterModel(groups=(NodeGroup(faster, num_nodes),), storage_rate=more))
    assert after[0] <= before[0] * (1 + EXACT)


FAN_OUTS = [
    None,
    FanOut(stream_rate=2e6, delay_seconds=0.01, num_receivers=2),
    FanOut(stream_rate=50e6, delay_seconds=0.0, num_receivers=4, link_rate=20e6),
]


SHAPED = {"first_byte_seconds": 0.05, "copy_seconds": 0.01, "stream_rate": 1.5e6, "node_rate": 8e6}


@pytest.mark.parametrize("num_nodes", [1, 2, 5])
@pytest.mark.parametrize("storage_rate", [3e6, 30e6])
def test_one_node_stands_for_all_that_are_alike(num_nodes, storage_rate):
    """The short way of a thousand nodes against every node for itself: not close, but the same."""
    one = node(num_slots=4, **SHAPED)
    short = ClusterModel(groups=(NodeGroup(one, num_nodes),), storage_rate=storage_rate)
    whole = replace(short, groups=(NodeGroup(one),) * num_nodes)
    assert replay_cluster(whole) == pytest.approx(replay_cluster(short) * num_nodes)


@pytest.mark.parametrize("fan_out", FAN_OUTS[1:], ids=["over-the-same-link", "over-another-link"])
@pytest.mark.parametrize("num_nodes", [2, 6])
@pytest.mark.parametrize("storage_rate", [3e6, 30e6])
def test_one_node_stands_for_all_that_send_to_each_other_in_turns(fan_out, num_nodes, storage_rate):
    """One node's replay knows no two that ask a third at the same moment; among all nodes that costs up to a seventh."""
    one = node(num_slots=16, **SHAPED)
    fan_out = replace(fan_out, num_receivers=16)
    short = ClusterModel(groups=(NodeGroup(one, num_nodes),), storage_rate=storage_rate, fan_out=fan_out)
    whole = replay_cluster(replace(short, groups=(NodeGroup(one),) * num_nodes))
    (ideal,) = replay_cluster(short)
    assert ideal * (1 - EXACT) <= max(whole) <= 1.15 * ideal


@pytest.mark.parametrize("fan_out", FAN_OUTS, ids=["each-for-itself", "over-the-same-link", "over-another-link"])
def test_one_slow_node_among_others_that_are_alike(fan_out):
    usual, slow = node(node_rate=8e6), node(node_rate=1e6)
    short = ClusterModel(groups=(NodeGroup(usual, 3), NodeGroup(slow)), fan_out=fan_out)
    whole = replace(short, groups=(NodeGroup(usual), NodeGroup(usual), NodeGroup(usual), NodeGroup(slow)))
    rest, last = replay_cluster(short)
    assert replay_cluster(whole) == pytest.approx((rest, rest, rest, last), rel=0.05)
    waits_for_it = rest > 1.5 * replay_seconds(usual)
    assert waits_for_it == (fan_out is not None), "whoever needs what it has read waits for the slow node"


@pytest.mark.parametrize("num_nodes", [2, 8, 64])
def test_what_is_read_once_for_all_nodes_still_comes_through_every_link(num_nodes):
    """Each node reads its part, and gets the others' parts from the others."""
    part = node(num_reads=2)
    total = num_nodes * bytes_of(part)
    usual = FanOut(stream_rate=math.inf, delay_seconds=0.0, num_receivers=8)
    by_link = ClusterModel(groups=(NodeGroup(replace(part, node_rate=5e6), num_nodes),), fan_out=usual)
    assert replay_cluster(by_link)[0] == pytest.approx(total / 5e6, rel=0.05)
    by_storage = ClusterModel(groups=(NodeGroup(part, num_nodes),), storage_rate=5e6, fan_out=usual)
    assert replay_cluster(by_storage)[0] == pytest.approx(total / 5e6, rel=0.05)
    other = replace(usual, link_rate=2e6)
    by_other = replace(by_storage, storage_rate=math.inf, fan_out=other)
    assert replay_cluster(by_other)[0] == pytest.approx((total - bytes_of(part)) / 2e6, rel=0.05)


@pytest.mark.parametrize("fan_out", FAN_OUTS[1:], ids=["over-the-same-link", "over-another-link"])
def test_a_node_that_has_no_other_sends_nothing(fan_out):
    alone = node(node_rate=5e6, first_byte_seconds=0.1)
    cluster = ClusterModel(groups=(NodeGroup(alone),), fan_out=fan_out)
    assert replay_cluster(cluster) == (pytest.approx(replay_seconds(alone)),)


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"first_byte_seconds": 0.5}, id="first bytes"),
        pytest.param({"first_byte_seconds": 0.5, "stream_rate": 3e6, "node_rate": 4e6}, id="several limits"),
        pytest.param({"first_byte_seconds": 0.5, "num_slots": 2}, id="slots"),
        pytest.param({"copy_seconds": 0.3, "node_rate": 100e6, "num_slots": 4}, id="copies"),
    ],
)
def test_an_even_load_goes_on_as_the_second_half_of_its_excerpt(limits):
    """Its start and its end are not multiplied: they happen once."""
    whole = replay_seconds(node(num_reads=240, **limits))
    excerpt = replace(node(num_reads=24, **limits), thinning=10, is_even=True)
    assert replay_seconds(excerpt) == pytest.approx(whole, rel=0.01)
    multiplied = replay_seconds(replace(excerpt, is_even=False))
    assert abs(multiplied - whole) >= abs(replay_seconds(excerpt) - whole)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_without_a_straggler_offers_are_known_at_once(num_ranks):
    """Two in three of its hand-overs wait until it has its CPU again; those of the others never wait."""
    prompt = node(num_ranks=num_ranks, num_slots=1, num_readers=1, first_byte_seconds=0.01, copy_seconds=0.001)

    def late(number, read):
        is_late = number % 3 > 0
        copies = (
            copy._replace(delay_seconds=0.05 if is_late and 0 in (read.rank, copy.rank) else 0.0)
            for copy in read.copies
        )
        return read._replace(copies=tuple(copies))

    ranks = (replace(rank, reads=tuple(late(*each) for each in enumerate(rank.reads))) for rank in prompt.ranks)
    held_up = replace(prompt, ranks=tuple(ranks))
    assert replay_seconds(without_straggler(held_up, 0)) == pytest.approx(replay_seconds(prompt), rel=EXACT)
    assert replay_seconds(held_up) > 2 * replay_seconds(prompt)
