"""What should a load of this checkpoint take here, what would bound it, and which settings are best? The plan, replayed at measured rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.planning.limits import useful_slots
from ray_streamer.rank.conditions import max_copiers
from ray_streamer.report.verdict.cost import find_model_costs
from ray_streamer.report.verdict.model import ClusterModel, NodeGroup
from ray_streamer.report.verdict.other_settings import under_settings
from ray_streamer.report.verdict.planned import Pace, model_of_plan
from ray_streamer.report.verdict.replay import replay_cluster, replay_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.doctor.memory_speed import MemorySpeed
    from ray_streamer.doctor.storage_speed import Measured
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.report.verdict.model import NodeModel

_CONCURRENCIES = (4, 8, 16, 32, 64)
_SHARED = 0.75
"""Of what so many streams would bring each alone: where they bring less, they share the node's rate."""

_AS_GOOD = 1.05
"""Times the best: the smallest number of reads in flight that is as good is advised."""


class Fleet(NamedTuple):
    """Nodes like this one, each with a copy of its own, that load at the same time.

    Attributes:
        num_nodes: How many, with this one.
        storage_rate: Bytes per second that the storage serves to all of them; no node can measure it alone.
    """

    num_nodes: int
    storage_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPrediction:
    """What the load takes when a whole fleet loads.

    Attributes:
        num_nodes: As in `Fleet`.
        storage_rate: As in `Fleet`.
        seconds: Until all have loaded, with the settings in force.
        read_bytes: What all of them read.
    """

    num_nodes: int
    storage_rate: float
    seconds: float
    read_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A load without the start of Ray and of the ranks.

    Attributes:
        seconds: With the settings in force.
        bound: What would bound it; a kind of `report.verdict.cost.Cost`, or "nothing alone".
        best_settings: Settings that make it faster; empty when those in force are as good as any.
        best_seconds: With those.
        read_bytes: What the node reads.
        fleet: The same for a fleet; None where none was named.
    """

    seconds: float
    bound: str
    best_settings: dict[str, int]
    best_seconds: float
    read_bytes: int
    fleet: FleetPrediction | None = None

    def as_rehearsed(self, seconds: float, bound: str) -> Prediction:
        """The same by what a part of the load took; other settings change it as they change the replay.

        Args:
            seconds: What the whole takes by that.
            bound: What bounded the part.
        """
        times = seconds / self.seconds if self.seconds else 1.0
        fleet = self.fleet
        if fleet is not None:
            # A fleet that its storage does not hold takes what each of its nodes takes.
            is_held = fleet.seconds > _AS_GOOD * self.seconds
            fleet = replace(fleet, seconds=max(fleet.seconds, seconds) if is_held else seconds)
        return replace(self, seconds=seconds, bound=bound, best_seconds=self.best_seconds * times, fleet=fleet)


class Node(NamedTuple):
    """What a load meets on this node.

    Attributes:
        storage: What the storage did, with several numbers of streams.
        memory: What memory does.
        memory_limit: Staging bytes of each rank.
        num_cpus: CPUs; ranks that share them copy in turn.
        concurrency: Reads in flight of each rank.
        is_cached: Whether the page cache holds the files, and nothing is read.
    """

    storage: Sequence[Measured]
    memory: MemorySpeed
    memory_limit: int
    num_cpus: int
    concurrency: int
    is_cached: bool = False


def predict(plan: ReadPlan, node: Node, *, fleet: Fleet | None = None) -> Prediction:
    """Replays the plan of the first node.

    Args:
        plan: Of the load.
        node: What was measured, and the settings in force.
        fleet: Nodes that load with it.
    """
    model = _model(plan, node)
    seconds = replay_seconds(model)
    tried = {number: replay_seconds(_with_readers(model, number, node.memory_limit)) for number in _CONCURRENCIES}
    best = next(number for number in _CONCURRENCIES if tried[number] <= _AS_GOOD * min(tried.values()))
    is_better = seconds > _AS_GOOD * tried[best]
    found = find_model_costs(model, seconds)
    read_bytes = plan.node_plans[plan.node_plan_ids[0]].read_bytes
    return Prediction(
        seconds=seconds,
        bound=found[0].kind if found else "nothing alone",
        best_settings={"concurrency": best} if is_better else {},
        best_seconds=tried[best] if is_better else seconds,
        read_bytes=read_bytes,
        fleet=_predict_fleet(plan, node, fleet, read_bytes) if fleet else None,
    )


def _predict_fleet(plan: ReadPlan, node: Node, fleet: Fleet, read_bytes: int) -> FleetPrediction:
    # What this node has in its page cache, the others may have to read.
    groups = (NodeGroup(_model(plan, node._replace(is_cached=False)), fleet.num_nodes),)
    (seconds,) = replay_cluster(ClusterModel(groups=groups, storage_rate=fleet.storage_rate))
    return FleetPrediction(
        num_nodes=fleet.num_nodes,
        storage_rate=fleet.storage_rate,
        seconds=seconds,
        read_bytes=fleet.num_nodes * read_bytes,
    )


def _with_readers(model: NodeModel, num_readers: int, memory_limit: int) -> NodeModel:
    num_slots = useful_slots(memory_limit=memory_limit, block_bytes=model.block_bytes, concurrency=num_readers)
    return under_settings(model, num_readers=num_readers, num_slots=num_slots, block_bytes=model.block_bytes)


def _model(plan: ReadPlan, node: Node) -> NodeModel:
    """The first node's plan, each read and copy at the rates that were measured."""
    node_plan = plan.node_plans[plan.node_plan_ids[0]]
    ranks = plan.topology.nodes[0]
    first_byte, stream_rate, node_rate = _rates(node)
    # Threads that copy at once share the CPUs.
    share = max(1.0, len(ranks) / max(1, node.num_cpus))
    pace = Pace(
        first_byte_seconds=first_byte,
        stream_rate=stream_rate,
        node_rate=node_rate,
        copy_rate=node.memory.copy_bytes_per_second / share,
        touch_rate=node.memory.touch_bytes_per_second / share,
        exchange_seconds=node.memory.exchange_seconds,
        num_readers=node.concurrency,
        num_slots=useful_slots(
            memory_limit=node.memory_limit,
            block_bytes=node_plan.limits.block_bytes,
            concurrency=node.concurrency,
        ),
        num_copiers=max_copiers(len(ranks)),
    )
    return model_of_plan(node_plan, ranks, pace, is_cached=node.is_cached)


def _rates(node: Node) -> tuple[float, float, float]:
    """First byte, rate of one stream, rate of all."""
    if not node.storage:
        return 0.0, math.inf, math.inf
    alone = node.storage[0]
    # The least: more reads in flight wait for each other, which the rate of all tells.
    first_byte = min(each.first_byte_seconds for each in node.storage if each.block_bytes == alone.block_bytes)
    stream_rate = alone.block_bytes / max(alone.receive_seconds, 1e-9)
    node_rate = max(each.bandwidth(first_byte) for each in node.storage)
    most = max(each.num_streams for each in node.storage)
    # As verdicts have it: a rate that was never met is twice the most that came.
    return first_byte, stream_rate, node_rate if node_rate < _SHARED * most * stream_rate else 2 * node_rate
