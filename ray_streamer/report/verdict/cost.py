"""What did a load spend its time on? It is replayed without each of its costs in turn; the one that saves most bounded it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from ray_streamer.report.verdict import without
from ray_streamer.report.verdict.replay import replay_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.report.verdict.model import NodeModel, RequestedSettings
    from ray_streamer.report.verdict.observe import Observed

_COSTS = {
    "losses": without.without_losses,
    "late answers": without.without_late_answers,
    "first byte": without.without_first_byte,
    "bandwidth": without.without_node_rate,
    "stream rate": without.without_stream_rate,
    "slots": without.without_slots,
    "first touch": without.without_first_touch,
    "copies": without.without_copies,
    "device": without.without_device_start,
}

_SPECIAL = frozenset({"slots", "straggler", "late answers", "first touch", "device"})
"""Costs that hide behind a more general one, as a lack of slots does behind the first byte of the few reads that have one."""

_HIDDEN_SHARE = 0.5
"""A special cost is named when it is at least this part of the largest one."""

_LEAST_SHARE = 0.1
"""Share of the load's time. Smaller costs bound nothing, and most of them are not named."""

_LEAST_LOSS = 0.02
"""The same for failed requests, which are named even when they cost little."""

MADE_WORSE = frozenset({"throttling", "max_bandwidth"})
"""Costs that no other number or size of requests makes smaller."""

LOSSES = frozenset({"throttling", "failed requests", "slow address"})
"""Costs of requests that were in vain, or went to a server that is ill."""

_MAX_SUSPECTS = 3
"""Ranks of which each is looked at as a straggler."""

_BUSY = 0.75
"""Share of the node's CPUs. Ranks that use so much of them are bound by the CPUs, and not by the storage."""

_ONE_CPU = (0.85, 1.3)
"""CPU seconds in each second of a rank whose threads wait for the interpreter lock: at least, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One thing that a load spent time on.

    Attributes:
        kind: What: "first byte", "bandwidth", "stream rate", "late answers", "throttling", "failed requests", "slow address",
            "slots", "straggler", "first touch", "copies", "device", "cpu", "interpreter", or a phase of the report before `load`.
        seconds: By how much shorter the load is without it.
        rank: The straggler; else None.
    """

    kind: str
    seconds: float
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCounts:
    """What the ranks of a node counted beside their traces: it names the reason of a cost.

    Attributes:
        num_throttled: Answers that asked to slow down.
        num_retries: Requests that were sent again.
        cpu_share: CPU time of all ranks over that of the node's CPUs.
        least_seconds: What the ranks' CPU time takes on all CPUs of the node; 0 where torch's import is part of it.
        rank_cpus: CPUs that each rank kept busy, the busiest and the idlest.
        max_bandwidth: The user's own bound, in bytes per second of the node.
        slow_address: That which lost more time than all failed requests; empty when there is none.
    """

    num_throttled: int
    num_retries: int
    cpu_share: float
    least_seconds: float
    rank_cpus: tuple[float, float]
    max_bandwidth: int | None
    slow_address: str = ""

    @classmethod
    def of(cls, traces: Sequence[RankTrace], statistics: Sequence[RankStatistics], asked: RequestedSettings) -> Self:
        """What the ranks of one node counted."""
        seconds = max(max(sum(rank.seconds.values()) for rank in statistics), 1e-9)
        num_cpus = max(trace.conditions.num_cpus for trace in traces)
        is_importing = any(rank.seconds.get("device") for rank in statistics)
        cpus = [rank.cpu_seconds / seconds for rank in statistics]
        return cls(
            num_throttled=sum(rank.storage.num_throttled for rank in statistics),
            num_retries=sum(rank.storage.num_retries for rank in statistics),
            cpu_share=sum(cpus) / num_cpus,
            least_seconds=0.0 if is_importing else sum(rank.cpu_seconds for rank in statistics) / num_cpus,
            rank_cpus=(max(cpus), min(cpus)),
            max_bandwidth=asked.max_bandwidth,
            slow_address=_slow_address(traces),
        )

    def kind(self, cost: Cost, observed: Observed) -> str:
        """The name of a cost, by its reason where that is known."""
        if cost.kind == "losses":
            if self.slow_address:
                return "slow address"
            return "throttling" if 2 * self.num_throttled >= self.num_retries else "failed requests"
        if cost.kind != "bandwidth":
            return cost.kind
        if self.max_bandwidth is not None and observed.rates.node == self.max_bandwidth:
            return "max_bandwidth"
        if self.cpu_share >= _BUSY:
            return "cpu"
        busiest, idlest = self.rank_cpus
        return "interpreter" if _ONE_CPU[0] <= idlest and busiest <= _ONE_CPU[1] else cost.kind


def _slow_address(traces: Sequence[RankTrace]) -> str:
    """The address that lost most time, if that is more than what failed requests lost."""
    lost: dict[str, float] = defaultdict(float)
    for trace in traces:
        for incident in trace.incidents:
            lost[incident.address] += incident.lost_seconds
    return max(lost, key=lost.__getitem__, default="")


def find_costs(observed: Observed, counts: NodeCounts, replayed: float) -> tuple[Cost, ...]:
    """What the load would have been shorter by without each cost, the largest first; small ones are left out.

    Args:
        observed: The load.
        counts: What was counted beside it.
        replayed: Seconds of its replay.
    """
    return tuple(replace(cost, kind=counts.kind(cost, observed)) for cost in find_model_costs(observed.model, replayed))


def find_model_costs(model: NodeModel, replayed: float) -> list[Cost]:
    """The same of a model alone, by the names of what was left out."""
    found = [Cost(kind=kind, seconds=replayed - replay_seconds(change(model))) for kind, change in _COSTS.items()]
    for local in _suspects(model):
        seconds = replayed - replay_seconds(without.without_straggler(model, local))
        found.append(Cost(kind="straggler", seconds=seconds, rank=model.ranks[local].rank))
    least = {"losses": _LEAST_LOSS}
    named = (cost for cost in found if cost.seconds >= least.get(cost.kind, _LEAST_SHARE) * replayed > 0)
    return sorted(named, key=lambda cost: -cost.seconds)


def find_bound(found: Sequence[Cost], replayed: float) -> Cost | None:
    """The cost that bounded a load, of those that `find_costs` found; None when none of them is large."""
    large = [cost for cost in found if cost.seconds >= _LEAST_SHARE * replayed]
    lost = [cost for cost in large if cost.kind in LOSSES]
    if lost:
        # Whatever else is slow: what helps against that, such as more requests at once, makes refusals more.
        return lost[0]
    special = [cost for cost in large if cost.kind in _SPECIAL]
    if special and special[0].seconds >= _HIDDEN_SHARE * large[0].seconds:
        return special[0]
    return large[0] if large else None


def _suspects(model: NodeModel) -> list[int]:
    """The ranks that spent most on what they did."""
    if len(model.ranks) == 1:
        return []
    spent = [
        rank.ready_seconds
        + sum(read.prepare_seconds + read.first_byte_seconds + read.own.seconds for read in rank.reads)
        + sum(read.work_bytes for read in rank.reads) / min(model.stream_rate, model.node_rate)
        + sum(copy.seconds for copy in rank.mapped)
        for rank in model.ranks
    ]
    for copy in (copy for rank in model.ranks for read in rank.reads for copy in read.copies):
        spent[copy.rank] += copy.seconds
    return sorted(range(len(spent)), key=lambda local: -spent[local])[:_MAX_SUSPECTS]
