"""Was the node of a rank lost, and where may the rank go? Ray moves a bundle of a placement group to another node that has room.

Ray notices after some seconds that a node is gone. Until then it starts actors there, which end with the node. From then on the
group is being rescheduled, and actors in the lost bundles wait for room without a word of Ray's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_streamer.cluster.seats import own_groups
from ray_streamer.cluster.waiting import RoomWanted, placement_group_state, wait_for_room
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray.util.placement_group import PlacementGroup

    from ray_streamer.cluster.names import GroupName
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.cluster.seats import Seat
    from ray_streamer.cluster.waiting import Deadline


def why_lost(seat: Seat, death: object) -> str | None:
    """What to do where a rank did not start since its node was lost; None where it was not.

    Args:
        seat: Of the rank.
        death: What Ray says about the end of its actor.
    """
    if isinstance(seat.scheduling_strategy, NodeAffinitySchedulingStrategy):
        if any(node["NodeID"] == seat.node_id and node["Alive"] for node in ray.nodes()):
            return None
        return "Its node was lost, and a rank that reserves nothing cannot go to another one: load again"
    if "node has died" not in str(death):
        return None
    return "Its node was lost: call again, and the rank goes to another node as soon as one has room, or load again"


def wait_for_other_nodes(
    seats: Mapping[int, Seat], name: GroupName, options: PlacementOptions, deadline: Deadline
) -> None:
    """Waits until ranks whose node was lost have room on another one; returns at once where none was.

    Args:
        seats: Of the ranks that are to start again.
        name: Of their group.
        options: What each of them needs.
        deadline: Until when to wait.

    Raises:
        ClusterError: Their placement group was removed.
        StartupTimeoutError: There was no room in time; says what is missing, and who holds it.
    """
    for ranks, group in _rescheduled(seats):
        wanted = RoomWanted(
            label=name.label,
            num_ranks=len(ranks),
            bundle=options.bundle,
            strategy=options.strategy,
            ours=dict(own_groups),
            who=f"rank {listed([*map(str, ranks)])}, whose node was lost,",
        )
        wait_for_room(group, wanted, deadline)


def _rescheduled(seats: Mapping[int, Seat]) -> Iterator[tuple[list[int], PlacementGroup]]:
    """The placement groups that lost a node and have not got all of their bundles back, with the ranks in them."""
    groups: dict[PlacementGroup, list[int]] = {}
    for rank, seat in seats.items():
        if isinstance(seat.scheduling_strategy, PlacementGroupSchedulingStrategy):
            groups.setdefault(seat.scheduling_strategy.placement_group, []).append(rank)
    for group, ranks in groups.items():
        if placement_group_state(group) == "RESCHEDULING":
            yield ranks, group
