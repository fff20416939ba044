"""Which bundles of a placement group can ranks have? What Ray says is free, less what loads of this process hold there.

Ray tells late what is in use. Two loads that start side by side, such as those of a model and its draft in one Serve replica,
would choose the same bundles, and wait for each other.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from ray_streamer.cluster.placement import choose_bundles, count_ranks
from ray_streamer.cluster.waiting import Deadline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

# What is free in a group is reported late, for a new group too; one that looks full is looked at again for this long.
_REPORT_DELAY_SECONDS = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class _Hold:
    """What one rank of this process's loads has in a bundle."""

    group_id: str
    index: int
    need: Mapping[str, float]


_holds: list[_Hold] = []
# A model that is garbage gives back what it holds in whatever this thread does.
_changing = threading.RLock()


def bundles_of(group: PlacementGroup) -> list[dict[str, float]]:
    """What each bundle reserves; none where the group was removed."""
    bundles = placement_group_table(group).get("bundles", {})
    return [bundles[index] for index in sorted(bundles)]


def nodes_of(group: PlacementGroup) -> list[str]:
    """Ray's id of each bundle's node."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[index] for index in sorted(nodes)]


def sizes_of(bundles: Sequence[Mapping[str, float]], need: Mapping[str, float], num_ranks: int) -> list[int]:
    """How many ranks that need this each bundle can hold."""
    if need:
        return [max(0, count_ranks(bundle, need)) for bundle in bundles]
    # Ranks that need nothing fit anywhere: deal them out evenly.
    return [-(-num_ranks // len(bundles)) for _ in bundles]


def hold_free(
    group: PlacementGroup, need: Mapping[str, float], num_ranks: int, *, resources: ExitStack
) -> tuple[int, ...] | None:
    """Bundles for the ranks in what others leave free, held as `hold` does; None when that is too little."""
    deadline = Deadline(_REPORT_DELAY_SECONDS)
    while True:
        with _changing:
            free = sizes_of(_free_bundles(group), need, num_ranks)
            chosen = choose_bundles(free, nodes_of(group), num_ranks)
            if chosen is not None:
                hold(group, chosen, need, resources=resources)
        if chosen is not None or not deadline.remaining_seconds:
            return chosen
        time.sleep(0.1)


def hold(group: PlacementGroup, indices: Sequence[int], need: Mapping[str, float], *, resources: ExitStack) -> None:
    """Keep other loads of this process out of what ranks need in these bundles, until `resources` is closed."""
    for index in indices:
        held = _Hold(group.id.hex(), index, need)
        resources.callback(_let_go, held)
        with _changing:
            _holds.append(held)


def _let_go(held: _Hold) -> None:
    with _changing:
        _holds.remove(held)


def _free_bundles(group: PlacementGroup) -> list[dict[str, float]]:
    # Ray renames the resources of a bundle; one that is used up is not listed.
    free, group_id = ray.available_resources(), group.id.hex()
    return [
        {
            name: min(free.get(f"{name}_group_{index}_{group_id}", 0.0), amount - _held(group_id, index, name))
            for name, amount in bundle.items()
        }
        for index, bundle in enumerate(bundles_of(group))
    ]


def _held(group_id: str, index: int, name: str) -> float:
    return sum(held.need.get(name, 0.0) for held in _holds if (held.group_id, held.index) == (group_id, index))
