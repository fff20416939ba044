"""Who reads what, and who sends what to whom? Each way to load a model onto many nodes, as a cluster that can be replayed.

All ways have the same requests in flight, blocks and staging memory, so they differ by what they read and send. Nodes are replicas: each
holds the whole model, one part on each of its GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cold_starts.node_models import part_of_nodes, side_by_side, with_whole_blocks
from cold_starts.scenarios import FABRIC_STREAM_RATE, LIMITS, PEER_DELAY_SECONDS, PEER_STREAM_RATE
from ray_streamer.planning.limits import DEFAULT_MEMORY_LIMIT, useful_slots
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.conditions import MAX_COPIERS
from ray_streamer.report.verdict import without
from ray_streamer.report.verdict.model import ClusterModel, FanOut, NodeGroup
from ray_streamer.report.verdict.planned import MAX_BLOCKS, Pace, model_of_plan
from ray_streamer.report.verdict.replay import replay_cluster
from ray_streamer.sharding import Mesh
from ray_streamer.sharding.source import RuleSlices

if TYPE_CHECKING:
    from collections.abc import Callable

    from cold_starts.scenarios import Machine, Model, Storage
    from ray_streamer.planning.node_plan import NodePlan
    from ray_streamer.report.verdict.model import NodeModel

Sharing = Literal["none", "broadcast", "slices", "cluster", "fabric"]

EXCHANGE_SECONDS = 0.0001


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to load.

    Attributes:
        sharing: What ranks share: nothing; whole tensors in a node; slices in a node; slices in the cluster, over the link to the storage
            or over a network of their own.
        name: In the page.
        says: Who does it.
        colour: In plots.
        line: In plots.
    """

    sharing: Sharing
    name: str
    says: str
    colour: str
    line: str = "solid"


STRATEGIES = (
    Strategy(
        sharing="none",
        name="every rank reads everything",
        says="Run:ai's streamer as it is set by default; each rank keeps its part",
        colour="#e5534b",
    ),
    Strategy(
        sharing="broadcast",
        name="each node reads once, and broadcasts tensors",
        says="Run:ai's streamer with `distributed`; without the waits of its rounds",
        colour="#d29922",
        line="dashed",
    ),
    Strategy(sharing="slices", name="each node reads once", says="ray_streamer", colour="#388bfd"),
    Strategy(
        sharing="cluster",
        name="the cluster reads once, over the same link",
        says="not built",
        colour="#2ea043",
        line="dotted",
    ),
    Strategy(
        sharing="fabric",
        name="the cluster reads once, over EFA",
        says="not built",
        colour="#a371f7",
        line="dotted",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cold start.

    Attributes:
        model: Of each replica.
        storage: Where its checkpoint is.
        machine: Of every node.
        strategy: How it is loaded.
        num_nodes: Replicas.
        concurrency: Requests in flight on each rank.
    """

    model: Model
    storage: Storage
    machine: Machine
    strategy: Strategy
    num_nodes: int
    concurrency: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What it costs.

    Attributes:
        seconds: From the first request until the last byte is on the last GPU.
        storage_bytes: What the storage serves to all nodes.
        bound: What saves most when it is left out; "nothing alone" when that saves less than a tenth; None when it was not asked for.
    """

    seconds: float
    storage_bytes: int
    bound: str | None


_LEFT_OUT: dict[str, Callable[[ClusterModel], ClusterModel]] = {
    "storage": lambda cluster: replace(cluster, storage_rate=math.inf),
    "the node's link": lambda cluster: _with_nodes(cluster, without.without_node_rate),
    "first byte": lambda cluster: _with_nodes(cluster, without.without_first_byte),
    "stream rate": lambda cluster: _with_nodes(cluster, without.without_stream_rate),
    "copies": lambda cluster: _with_nodes(cluster, without.without_copies),
    "other nodes": lambda cluster: replace(
        cluster, fan_out=cluster.fan_out and replace(cluster.fan_out, stream_rate=math.inf, link_rate=math.inf)
    ),
}

_LEAST_SHARE = 0.1


def answer(case: Case, *, finds_bound: bool = True) -> Answer:
    """Replays a case; to find what bounds it, also as it would be without each limit."""
    cluster = cluster_of(case)
    (seconds,) = replay_cluster(cluster)
    bound = _find_bound(cluster, seconds) if finds_bound else None
    return Answer(seconds=seconds, storage_bytes=storage_bytes(case), bound=bound)


def _find_bound(cluster: ClusterModel, seconds: float) -> str:
    changed = {name: change(cluster) for name, change in _LEFT_OUT.items()}
    saved = {name: seconds - replay_cluster(other)[0] for name, other in changed.items() if other != cluster}
    most = max(saved, key=lambda name: saved[name])
    return most if saved[most] >= _LEAST_SHARE * seconds else "nothing alone"


def cluster_of(case: Case, *, max_blocks: int = MAX_BLOCKS) -> ClusterModel:
    """The nodes of a case.

    Args:
        case: Which.
        max_blocks: As in `model_of_plan`.
    """
    node = node_of(case, max_blocks=max_blocks)
    fan_out = None
    if case.strategy.sharing in ("cluster", "fabric"):
        fan_out = _fan_out(case)
        node = part_of_nodes(node, case.num_nodes)
    groups = (NodeGroup(node, case.num_nodes),)
    return ClusterModel(groups=groups, storage_rate=case.storage.total_rate, fan_out=fan_out)


def node_of(case: Case, *, max_blocks: int) -> NodeModel:
    """One of the nodes, as if it read all that it needs."""
    num_gpus, sharing = case.machine.num_gpus, case.strategy.sharing
    pace = _pace(case)
    if sharing == "none":
        # Each copies its part of what it reads to its GPU.
        alone = model_of_plan(
            _plan(case.model, 1, is_whole=True),
            (0,),
            replace(pace, copy_rate=pace.copy_rate * num_gpus),
            max_blocks=max_blocks // num_gpus,
        )
        return side_by_side([alone] * num_gpus)
    if sharing == "broadcast":
        whole = _plan(case.model, num_gpus, is_whole=True)
        broadcast = replace(pace, copy_rate=case.machine.broadcast_rate)
        return with_whole_blocks(model_of_plan(whole, range(num_gpus), broadcast, max_blocks=max_blocks))
    plan = _plan(case.model, num_gpus, is_whole=False)
    num_sharers = 1 if sharing == "slices" else case.num_nodes
    return model_of_plan(plan, range(num_gpus), pace, num_sharers=num_sharers, max_blocks=max_blocks)


def storage_bytes(case: Case) -> int:
    """What the storage serves to all nodes."""
    num_gpus = case.machine.num_gpus
    if case.strategy.sharing == "none":
        return case.num_nodes * num_gpus * _plan(case.model, 1, is_whole=True).read_bytes
    of_node = _plan(case.model, num_gpus, is_whole=case.strategy.sharing == "broadcast").read_bytes
    return of_node if case.strategy.sharing in ("cluster", "fabric") else case.num_nodes * of_node


_PLANS: dict[tuple[str, int, bool], NodePlan] = {}


def _plan(model: Model, num_ranks: int, *, is_whole: bool) -> NodePlan:
    """What one node reads whose ranks each hold all of the model, or each a part."""
    key = (model.name, num_ranks, is_whole)
    if key not in _PLANS:
        mesh = Mesh(dp=num_ranks) if is_whole else Mesh(tp=num_ranks)
        source = RuleSlices(mesh=mesh)
        first = source(model.index, 0)
        slices = [first if is_whole else source(model.index, rank) for rank in range(num_ranks)]
        _PLANS[key] = plan_reads(model.index, slices, Topology.even(num_ranks), LIMITS).node_plans[0]
    return _PLANS[key]


def _pace(case: Case) -> Pace:
    return Pace(
        first_byte_seconds=case.storage.first_byte_seconds,
        first_byte_spread_seconds=case.storage.first_byte_spread_seconds,
        stream_rate=case.storage.stream_rate,
        node_rate=case.machine.link_rate,
        copy_rate=case.machine.gpu_copy_rate,
        touch_rate=math.inf,
        exchange_seconds=EXCHANGE_SECONDS,
        num_readers=case.concurrency,
        num_slots=useful_slots(
            memory_limit=DEFAULT_MEMORY_LIMIT, block_bytes=LIMITS.block_bytes, concurrency=case.concurrency
        ),
        num_copiers=MAX_COPIERS,
        is_read_into_tensors=False,
    )


def _fan_out(case: Case) -> FanOut:
    is_fabric = case.strategy.sharing == "fabric"
    return FanOut(
        stream_rate=FABRIC_STREAM_RATE if is_fabric else PEER_STREAM_RATE,
        delay_seconds=PEER_DELAY_SECONDS,
        num_receivers=case.concurrency,
        link_rate=case.machine.fabric_rate if is_fabric else None,
    )


def _with_nodes(cluster: ClusterModel, change: Callable[[NodeModel], NodeModel]) -> ClusterModel:
    return replace(cluster, groups=tuple(NodeGroup(change(node), number) for node, number in cluster.groups))
