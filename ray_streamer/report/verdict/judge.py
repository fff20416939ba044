"""Why did a load take as long as it did? Its costs, the setting that would have helped, and both in words, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rank.conditions import READS_OF_A_DISK
from ray_streamer.report.verdict.advice import MAX_CONCURRENCY, Advice, Knobs, find_advice
from ray_streamer.report.verdict.cost import LOSSES, MADE_WORSE, Cost, NodeCounts, find_bound, find_costs
from ray_streamer.report.verdict.observe import observe_node
from ray_streamer.report.verdict.paragraph import Facts, paragraph
from ray_streamer.report.verdict.replay import replay_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.report.verdict.model import RequestedSettings
    from ray_streamer.report.verdict.observe import Observed

_TRUSTED_DIFFERENCE = 0.25
"""A replay that differs by more from what was measured predicts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a load took as long as it did.

    Attributes:
        text: One paragraph.
        bound: `Cost.kind` of what bounded reading and copying; "nothing alone" where no cost stands out.
        costs: Of reading and copying, the largest first. They overlap: without one of them another takes its place.
        advice: A change of settings that helps; None when none does, or when nothing can be predicted.
        node: Where it was looked at: the node that took longest.
        measured_seconds: Reading and copying on that node.
        replayed_seconds: The same by its replay. Where the two differ much, nothing is predicted.
        node_bytes_per_second: What all streams of the node get together; None where no load has come up to it.
        stream_bytes_per_second: What one stream gets alone; None where it does not show.
    """

    text: str
    bound: str
    costs: tuple[Cost, ...]
    advice: Advice | None
    node: str
    measured_seconds: float
    replayed_seconds: float
    node_bytes_per_second: float | None = None
    stream_bytes_per_second: float | None = None


def judge(
    traces: Sequence[RankTrace],
    statistics: Sequence[RankStatistics],
    asked: RequestedSettings,
    phases: Mapping[str, float] | None = None,
) -> Verdict | None:
    """The verdict on one node's load; None when it read and copied nothing.

    Args:
        traces: Of the node's ranks, in local order.
        statistics: Of the same ranks.
        asked: The settings of the load.
        phases: Seconds by phase, as in `LoadReport.seconds`; none without a driver.
    """
    observed = observe_node(traces, max_bandwidth=asked.max_bandwidth)
    if observed is None:
        return None
    replayed, measured = replay_seconds(observed.model), observed.measured_seconds
    counts = NodeCounts.of(traces, statistics, asked)
    concurrency = min(trace.conditions.concurrency for trace in traces)
    found = find_costs(observed, counts, replayed)
    bound = find_bound(found, replayed)
    is_trusted = abs(replayed - measured) <= _TRUSTED_DIFFERENCE * measured
    advice = None
    if is_trusted and (bound is None or bound.kind not in MADE_WORSE) and not _is_throttled(found):
        advice = find_advice(
            observed.model,
            _knobs(observed, statistics, asked, concurrency=concurrency),
            measured_seconds=measured,
            replayed_seconds=replayed,
            cpu_seconds=counts.least_seconds,
            max_concurrency=READS_OF_A_DISK if all(trace.conditions.is_disk for trace in traces) else MAX_CONCURRENCY,
        )
    facts = Facts(
        phases=phases or {},
        measured_seconds=measured,
        replayed_seconds=replayed,
        is_trusted=is_trusted,
        rates=observed.rates,
        first_byte_seconds=float(np.median(observed.first_byte_seconds)) if len(observed.first_byte_seconds) else 0.0,
        num_slots=min(trace.conditions.num_slots for trace in traces),
        concurrency=concurrency,
        max_bandwidth=asked.max_bandwidth,
        storage=[rank.storage for rank in statistics],
        node=traces[0].node,
        slow_address=counts.slow_address,
    )
    return _verdict(facts, found, bound, advice)


def _is_throttled(found: Sequence[Cost]) -> bool:
    """Whether the store refused requests, however little of the load that cost: it would refuse more of more."""
    return any(cost.kind == "throttling" for cost in found)


def _knobs(
    observed: Observed, statistics: Sequence[RankStatistics], asked: RequestedSettings, *, concurrency: int
) -> Knobs:
    """The settings in force, with blocks as large as they were."""
    return Knobs(
        concurrency=concurrency,
        memory_limit=min(rank.memory_limit for rank in statistics),
        block_bytes=asked.block_bytes,
    ).of_blocks(observed.model.block_bytes)


def _verdict(facts: Facts, found: tuple[Cost, ...], bound: Cost | None, advice: Advice | None) -> Verdict:
    rates = facts.rates
    return Verdict(
        text=paragraph(facts, bound, advice, lost=next((cost for cost in found if cost.kind in LOSSES), None)),
        bound="nothing alone" if bound is None else bound.kind,
        costs=found,
        advice=advice,
        node=facts.node,
        measured_seconds=facts.measured_seconds,
        replayed_seconds=facts.replayed_seconds,
        # Unless streams were seen to share it, the node's rate is a guess.
        node_bytes_per_second=rates.node if rates.is_shared else None,
        stream_bytes_per_second=None if math.isinf(rates.stream) else rates.stream,
    )
