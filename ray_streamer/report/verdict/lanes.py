"""Which ways do bytes take to the nodes of a cluster? From the storage over a node's link; from a node over its link and the other's.

    storage ──> link into the node ──> node              one lane for each group of nodes
    node ──> link out of it ──> link into the other      one lane for each pair of groups, where nodes pass on what they read

One node stands for all of its group, so on a link that the whole group shares each of its streams counts as many times as there are nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.report.verdict.flows import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.report.verdict.model import ClusterModel, FanOut, NodeGroup

_STORAGE = 0


def lanes_of(cluster: ClusterModel) -> tuple[Lane, ...]:
    """All ways; `storage_lane` and `peer_lane` say where each is."""
    groups, fan_out = cluster.groups, cluster.fan_out
    from_storage = [
        Lane(group.node.stream_rate, ((_STORAGE, group.num_nodes), (_link_in(place), 1.0)))
        for place, group in enumerate(groups)
    ]
    return (*from_storage, *(_peer_lanes(groups, fan_out) if fan_out else ()))


def capacities_of(cluster: ClusterModel) -> tuple[float, ...]:
    """Bytes per second of each link that the lanes name."""
    groups, fan_out = cluster.groups, cluster.fan_out
    link_rates = [group.node.node_rate for group in groups]
    peer_rates = link_rates if fan_out is None or fan_out.link_rate is None else [fan_out.link_rate] * len(groups)
    return (cluster.storage_rate, *link_rates, *peer_rates, *peer_rates)


def storage_lane(group: int) -> int:
    """From the storage to a node of the group at this place."""
    return group


def peer_lane(sender: int, receiver: int, num_groups: int) -> int:
    """From nodes of one group to a node of another, or of the same."""
    return num_groups * (1 + sender) + receiver


def _peer_lanes(groups: tuple[NodeGroup, ...], fan_out: FanOut) -> Iterator[Lane]:
    num_groups = len(groups)
    for sender, senders in enumerate(groups):
        for receiver, receivers in enumerate(groups):
            link_out = 1 + num_groups + sender
            link_in = _link_in(receiver) if fan_out.link_rate is None else 1 + 2 * num_groups + receiver
            share = receivers.num_nodes / senders.num_nodes
            yield Lane(fan_out.stream_rate, ((link_out, share), (link_in, 1.0)))


def _link_in(group: int) -> int:
    return 1 + group
