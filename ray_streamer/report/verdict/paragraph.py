"""How is a verdict said? One paragraph: where the time went, what bounded it, what would help and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.units import counted, human_bytes, human_rate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.report.verdict.advice import Advice
    from ray_streamer.report.verdict.cost import Cost
    from ray_streamer.report.verdict.rates import Rates
    from ray_streamer.storage.base import StorageStatistics

_START = {
    "check": "the driver's look at the checkpoint",
    "ray": "Ray's start or connection",
    "start": "the start of the ranks' processes",
    "headers": "the headers",
    "plan": "the ranks' meeting and plan",
}
"""What the phases before `import` and `load` are, in words."""

_WORTH_SAYING = 0.1
"""Phases that took less of the whole are not named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a paragraph says besides costs.

    Attributes:
        phases: Seconds by phase of the driver; none without one.
        measured_seconds: Reading and copying.
        replayed_seconds: The same by its replay.
        is_trusted: Whether the replay is close enough to predict anything.
        rates: What the storage gave.
        first_byte_seconds: Median wait for a first byte; 0 when the storage tells of none.
        num_slots: Fewest slots of a rank.
        concurrency: Reads in flight.
        max_bandwidth: The user's own bound.
        storage: What each rank's storage counted.
        node: Where it was.
        slow_address: Of the storage; empty when there is none.
    """

    phases: Mapping[str, float]
    measured_seconds: float
    replayed_seconds: float
    is_trusted: bool
    rates: Rates
    first_byte_seconds: float
    num_slots: int
    concurrency: int
    max_bandwidth: int | None
    storage: Sequence[StorageStatistics]
    node: str
    slow_address: str = ""


def paragraph(facts: Facts, bound: Cost | None, advice: Advice | None, *, lost: Cost | None = None) -> str:
    """The verdict in words, with settings as arguments of Python.

    Args:
        facts: What is said beside costs.
        bound: What bounded the load.
        advice: What would help.
        lost: What failed requests cost, which is said even where it is little.
    """
    sentences = [*_of_the_start(facts), _of_the_bound(facts, bound)]
    if lost is not None and lost is not bound:
        sentences.append(f"Beside that, {_what(facts, lost)} cost {_seconds(lost.seconds)}.")
    if not facts.is_trusted:
        sentences.append(
            f"A replay of this load takes {_seconds(facts.replayed_seconds)}: too far off to predict what would help."
        )
    elif advice is not None:
        sentences.append(
            f"With {advice.text}: {_seconds(advice.seconds)} instead of {_seconds(advice.instead_of_seconds)}."
        )
    if bound is not None and (remedy := _remedy(facts, bound, has_advice=advice is not None)):
        sentences.append(remedy)
    return " ".join(sentences)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _of_the_start(facts: Facts) -> list[str]:
    """What came before the first read, where it was long."""
    total = facts.phases.get("total", 0.0)
    told = sorted(((facts.phases.get(name, 0.0), words) for name, words in _START.items()), key=lambda pair: -pair[0])
    long = [(seconds, words) for seconds, words in told if seconds >= _WORTH_SAYING * total > 0]
    if not long:
        return []
    parts = ", ".join(f"{_seconds(seconds)} {words}" for seconds, words in long)
    spent = sum(seconds for seconds, _ in told)
    sentence = f"Of {_seconds(total)}, {_seconds(spent)} passed before the first read: {parts}."
    if spent < total / 2 or "headers" in facts.phases:
        return [sentence]
    return [sentence, "Ranks that stay load other weights without that: model.reload()."]


def _of_the_bound(facts: Facts, bound: Cost | None) -> str:
    took = f"Reading and copying took {_seconds(facts.measured_seconds)}"
    if bound is None:
        return f"{took}; nothing alone bounded it."
    without = max(0.0, facts.measured_seconds - bound.seconds)
    return f"{took}, bound by {_what(facts, bound)}; without that {_seconds(without)}."


def _what(facts: Facts, bound: Cost) -> str:
    """What bounded the load."""
    throttled = counted(sum(each.num_throttled for each in facts.storage), "answer")
    retried = counted(sum(each.num_retries for each in facts.storage), "retry", "retries")
    node_rate = "" if math.isinf(facts.rates.node) else f" ({human_rate(facts.rates.node)})"
    stream_rate = "" if math.isinf(facts.rates.stream) else f" ({human_rate(facts.rates.stream)})"
    limit = "" if facts.max_bandwidth is None else f" of {human_bytes(facts.max_bandwidth)} per second"
    return {
        "first byte": f"the wait for the storage's first byte (median {facts.first_byte_seconds * 1000:.0f} ms)",
        "bandwidth": f"the bandwidth from the storage to this node{node_rate}",
        "max_bandwidth": f"max_bandwidth{limit}",
        "stream rate": f"the rate of each stream from the storage{stream_rate}",
        "late answers": "few answers of the storage that came much later than the others",
        "throttling": f"the storage's throttling ({throttled} to slow down, and the waits after them)",
        "failed requests": f"requests that failed ({retried})",
        "slow address": f"the storage's address {facts.slow_address}, from which bytes came more slowly than from its others",
        "slots": f"staging memory ({counted(facts.num_slots, 'slot')} for {facts.concurrency} reads in flight)",
        "straggler": f"rank {bound.rank}, which was slower than the other ranks of {facts.node}",
        "first touch": "the first touch of the tensors' memory (page faults)",
        "copies": "copies into the tensors",
        "device": "the wait for torch's import and the device",
        "cpu": f"this node's CPUs, which were busy{node_rate}",
        "interpreter": f"Python's interpreter lock, with one CPU busy in each rank{node_rate}",
    }[bound.kind]


def _remedy(facts: Facts, bound: Cost, *, has_advice: bool) -> str:
    """What helps beside settings; empty when nothing is known."""
    fewer = max(1, facts.concurrency // 2)
    known = {
        "straggler": f"Look at the process of rank {bound.rank}: its CPUs, its GPU and what else runs there.",
        "throttling": f"Ask for less at once, such as concurrency={fewer}, or spread the files over more prefixes.",
        "failed requests": "Run with logging at INFO to see what failed.",
        "slow address": f"Look at the server, or the path to it, at {facts.slow_address}.",
        "first touch": "Memory that was used before has no page faults: model.reload(), or out= of load_rank.",
        "max_bandwidth": "Raise max_bandwidth, or leave it out.",
    }
    if bound.kind in known or has_advice:
        return known.get(bound.kind, "")
    return {
        "bandwidth": "No setting changes that: it takes a faster link, or faster storage.",
        "cpu": "No setting changes that: it takes more CPUs for the ranks, or plain HTTP in place of TLS.",
    }.get(bound.kind, "")
