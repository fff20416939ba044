"""What would a load read? The plan, made in this process from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from ray_streamer.api.request import make_request
from ray_streamer.planning.limits import DEFAULT_MEMORY_LIMIT, share_memory
from ray_streamer.planning.topology import Topology
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from ray_streamer.api.request import SliceArguments, Stages
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.storage import UriLike


def plan(
    uri: UriLike,
    tp: int = 1,
    *,
    pp: Stages = 1,
    ep: int | bool = False,
    replicas: int = 1,
    num_nodes: int = 1,
    settings: Settings | None = None,
    **slicing: Unpack[SliceArguments],
) -> ReadPlan:
    """Plans a load without loading; only headers are read, and Ray is not used.

    Args:
        uri: As in `load_sharded`.
        tp: As in `load_sharded`.
        pp: As in `load_sharded`.
        ep: As in `load_sharded`.
        replicas: As in `load_sharded`.
        num_nodes: Nodes over which the ranks are packed in order.
        settings: Every knob; from the environment when unset. Without a memory limit, that of a large node is assumed.
        slicing: `rules`, `slices`, `unmatched`, `layout`, `mtp`, `experts`, `fuse`, `rename` and `dtype`, as in `load_sharded`.

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
    request = make_request(uri, tp=tp, pp=pp, ep=ep, replicas=replicas, settings=settings, device="cpu", **slicing)
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
