"""Where exactly does each rank sit? Reservations from Ray: the caller's group, the current one, or an own one.

    a placement group is given          its bundles
    this actor is in a group with room  that group's bundles
    ranks reserve nothing               plain nodes, the driver's first (Ray has no empty bundles)
    otherwise                           an own placement group, removed by the stack that it is entered in

A group that could never have room is refused at once; one whose room is taken is waited for (`waiting`). Seats come in
rank order, so that an actor has its rank, and its name, from the start.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_streamer.cluster import keeper
from ray_streamer.cluster.bundles import bundles_of, hold, hold_free, nodes_of, sizes_of
from ray_streamer.cluster.calls import kill
from ray_streamer.cluster.placement import (
    NodeRoom,
    PlacementOptions,
    check_room,
    choose_bundles,
    choose_strategy,
    count_ranks,
    describe,
    order_by_node,
)
from ray_streamer.cluster.waiting import Deadline, RoomWanted, wait_for_room
from ray_streamer.errors import ClusterError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.cluster.names import GroupName

own_groups: dict[str, str] = {}
"""What this process has reserved: placement group -> what is in it, for those who wait for room."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one rank's actor.

    Attributes:
        name: How messages name it.
        node_id: Ray's id of its node.
        scheduling_strategy: What Ray is given for the actor.
    """

    name: str
    node_id: str
    scheduling_strategy: PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy


def take_seats(
    name: GroupName, options: PlacementOptions, *, deadline: Deadline, resources: ExitStack
) -> tuple[Seat, ...]:
    """The seat of each rank, all of them reserved; by node, this one's first, unless `bundle_indices` says otherwise.

    Args:
        name: What the group is called, and how many ranks it has.
        options: What each needs, and where.
        deadline: Until when to wait for room.
        resources: Owns what was made here: closing it removes an own placement group, and lets other loads have the bundles.

    Raises:
        ClusterError: The cluster or the given group could not hold the ranks even when idle.
        StartupTimeoutError: There would be room, but it did not become free in time.
    """
    if options.placement_group is not None:
        seats = _seats_in_given(options.placement_group, name, options, deadline, resources)
        return seats if options.bundle_indices is not None else _in_rank_order(seats)
    current = get_current_placement_group()
    if current is not None:
        beside = _seats_in_current(current, name.num_ranks, options.bundle, resources)
        if beside is not None:
            return _in_rank_order(beside)
    if not options.bundle:
        return _in_rank_order(_seats_on_nodes(name.num_ranks, options))
    return _in_rank_order(_seats_in_own(name, options, deadline, resources))


def _in_rank_order(seats: Sequence[Seat]) -> tuple[Seat, ...]:
    here = ray.get_runtime_context().get_node_id()
    return tuple(seats[index] for index in order_by_node([seat.node_id for seat in seats], first=here))


def _seats_in_given(
    group: PlacementGroup, name: GroupName, options: PlacementOptions, deadline: Deadline, resources: ExitStack
) -> tuple[Seat, ...]:
    num_ranks = name.num_ranks
    bundles = bundles_of(group)
    sizes = sizes_of(bundles, options.bundle, num_ranks)
    if options.bundle_indices is not None:
        _check_indices(options.bundle_indices, sizes, num_ranks)
    elif sum(sizes) < num_ranks:
        raise ClusterError(
            f"placement group {group.id.hex()} has room for {sum(sizes)} of {counted(num_ranks, 'rank')} with "
            f"{describe(options.bundle)} each; its bundles: {[describe(bundle) for bundle in bundles]}. "
            "Use a smaller tp, less per rank (num_cpus_per_rank=, num_gpus_per_rank=, resources=) or a larger group"
        )
    _wait_until_ready(group, name, options, options.strategy, deadline)
    if options.bundle_indices is None:
        free = hold_free(group, options.bundle, num_ranks, resources=resources)
        if free is not None:
            return _bundle_seats(group, free)
    # Whoever holds the rest may be leaving: the ranks wait for it, as for everything at start.
    chosen = options.bundle_indices or choose_bundles(sizes, nodes_of(group), num_ranks)
    assert chosen is not None
    hold(group, chosen, options.bundle, resources=resources)
    return _bundle_seats(group, chosen)


def _seats_in_current(
    group: PlacementGroup, num_ranks: int, bundle: Mapping[str, float], resources: ExitStack
) -> tuple[Seat, ...] | None:
    """Seats beside this actor in its group, or None when the group has no room for all."""
    if sum(sizes_of(bundles_of(group), bundle, num_ranks)) < num_ranks:
        return None
    chosen = hold_free(group, bundle, num_ranks, resources=resources)
    return None if chosen is None else _bundle_seats(group, chosen)


def _seats_in_own(
    name: GroupName, options: PlacementOptions, deadline: Deadline, resources: ExitStack
) -> tuple[Seat, ...]:
    num_ranks = name.num_ranks
    rooms = [_room_of(node, options.bundle) for node in _nodes(options)]
    strategy = choose_strategy(options.strategy, rooms, num_ranks)
    if not options.wait_for_nodes:
        check_room(strategy, rooms, num_ranks, options.bundle)
    selectors = [dict(options.label_selector)] * num_ranks
    if keeper.is_needed():
        resources.callback(kill, [keeper.start_keeper(name)])
    try:
        group = placement_group(
            [options.bundle] * num_ranks, strategy=strategy, name=name.group, bundle_label_selector=selectors
        )
    except (TypeError, ValueError) as error:
        raise ClusterError(f"Ray refuses this placement group: {error}") from error
    resources.callback(_remove, group)
    _wait_until_ready(group, name, options, strategy, deadline)
    own_groups[group.id.hex()] = name.label
    return _bundle_seats(group, range(num_ranks))


def _room_of(node: Mapping[str, Any], bundle: Mapping[str, float]) -> NodeRoom:
    held = _held_by_this_actor() if node["NodeID"] == ray.get_runtime_context().get_node_id() else {}
    left = {resource: amount - held.get(resource, 0) for resource, amount in node["Resources"].items()}
    return NodeRoom(
        node["NodeManagerAddress"],
        node["Resources"],
        count_ranks(left, bundle),
        held={resource: amount for resource, amount in held.items() if resource in bundle},
    )


def _held_by_this_actor() -> Mapping[str, float]:
    """What the calling actor has for as long as it lives, so that its ranks can never get it."""
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE or context.get_actor_id() is None:
        return {}
    # In a placement group, what it holds is the group's already.
    return {} if get_current_placement_group() is not None else context.get_assigned_resources()


def _seats_on_nodes(num_ranks: int, options: PlacementOptions) -> tuple[Seat, ...]:
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted(_nodes(options), key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    rooms = [NodeRoom(node["NodeManagerAddress"], {}, num_ranks) for node in nodes]
    check_room(options.strategy, rooms, num_ranks, options.bundle)
    used = nodes if "SPREAD" in options.strategy else nodes[:1]
    return tuple(
        Seat(
            f"node {node['NodeManagerAddress']}",
            node["NodeID"],
            NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        for node in (used[rank % len(used)] for rank in range(num_ranks))
    )


def _nodes(options: PlacementOptions) -> list[dict[str, Any]]:
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and all(matches_label(node["Labels"].get(k), v) for k, v in options.label_selector.items())
    ]


def matches_label(label: str | None, condition: str) -> bool:
    """Whether a node's label meets one condition of Ray's syntax: `x`, `!x`, `in(x,y)` or `!in(x,y)`.

    >>> matches_label("h100", "in(h100, h200)"), matches_label(None, "!h100")
    (True, True)
    """
    wanted = condition.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
    return (label in {value.strip() for value in values}) != condition.startswith("!")


def _bundle_seats(group: PlacementGroup, indices: Sequence[int]) -> tuple[Seat, ...]:
    nodes = nodes_of(group)
    return tuple(
        Seat(f"bundle {index} of {group.id.hex()}", nodes[index], PlacementGroupSchedulingStrategy(group, index))
        for index in indices
    )


def _check_indices(indices: Sequence[int], sizes: Sequence[int], num_ranks: int) -> None:
    if len(indices) != num_ranks:
        raise ClusterError(
            f"bundle_indices={list(indices)} names {counted(len(indices), 'bundle')} for {counted(num_ranks, 'rank')}"
        )
    for index in indices:
        room = sizes[index] if 0 <= index < len(sizes) else 0
        if indices.count(index) > room:
            raise ClusterError(
                f"bundle_indices={list(indices)}: bundle {index} of {len(sizes)} has room for {counted(room, 'rank')}, not "
                f"{indices.count(index)}"
            )


def _wait_until_ready(
    group: PlacementGroup, name: GroupName, options: PlacementOptions, strategy: str, deadline: Deadline
) -> None:
    wanted = RoomWanted(
        label=name.label, num_ranks=name.num_ranks, bundle=options.bundle, strategy=strategy, ours=dict(own_groups)
    )
    wait_for_room(group, wanted, deadline)


def _remove(group: PlacementGroup) -> None:
    own_groups.pop(group.id.hex(), None)
    with suppress(RayError):
        if ray.is_initialized():
            remove_placement_group(group)
