"""What would a load read? The plan, made in this process from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.planning.limits import DEFAULT_MEMORY_LIMIT, share_memory
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.request import LoadRequest, slice_source
from ray_streamer.settings import Settings
from ray_streamer.sharding.mesh import Mesh

if TYPE_CHECKING:
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import SliceSource
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rules import RulesLike


def plan(
    uri: str,
    tp: int = 1,
    *,
    replicas: int = 1,
    num_nodes: int = 1,
    rules: RulesLike | None = None,
    slices: SliceSource | None = None,
    unmatched: Unmatched = "error",
    layout: Layout = "generic",
    drafts: bool = False,
    settings: Settings | None = None,
) -> ReadPlan:
    """Plans a load without loading; only headers are read, and Ray is not used.

    Args:
        uri: As in `load_sharded`.
        tp: Ranks that share one copy of the model.
        replicas: Copies of the model.
        num_nodes: Nodes over which the ranks are packed in order.
        rules: As in `load_sharded`.
        slices: As in `load_sharded`.
        unmatched: As in `load_sharded`.
        layout: As in `load_sharded`.
        drafts: As in `load_sharded`.
        settings: Every knob; from the environment when unset. Without a memory limit, that of a large node is assumed.

    Returns:
        The plan; `summarize(plan)` gives its figures.

    Raises:
        SettingsError: An argument cannot mean anything.
        BudgetError: The memory limit cannot work.
        CheckpointError: The checkpoint is malformed.
        ShardingError: A tensor has no rule, or cannot be cut.
        StorageError: There is no such checkpoint, or it may not be read.
        PlanError: The ranks cannot lie on that many nodes.
    """
    settings = settings or Settings.resolve()
    request = LoadRequest(
        uri=uri,
        mesh=Mesh(tp=tp, dp=replicas),
        slices=slice_source(rules, slices, unmatched=unmatched, layout=layout, drafts=drafts),
        settings=settings,
        device="cpu",
    )
    topology = Topology.even(request.mesh.num_ranks, num_nodes)
    return request.plan(topology, memory_limits=assumed_limits(topology, settings))


def assumed_limits(topology: Topology, settings: Settings) -> tuple[int, ...]:
    """Staging bytes of every rank on nodes of which nothing is known but that they have enough memory."""
    return share_memory(
        topology,
        memory_limit=settings.memory_limit,
        node_memory_limit=settings.node_memory_limit,
        available_bytes=[4 * DEFAULT_MEMORY_LIMIT * len(ranks) for ranks in topology.nodes],
    )
