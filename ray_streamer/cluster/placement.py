"""Where may the ranks of a group run, and is there room for them? Arithmetic only; `seats` talks to Ray.

Every rank needs the same amounts, so a node or bundle is described by one number: how many ranks it can hold. From this
follow the strategy, whether the group fits at all, which bundles of a given placement group it takes, and who shares a
node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self

from ray_streamer.arguments import check_choice
from ray_streamer.errors import ClusterError, SettingsError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Strategy = Literal["auto", "STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]

# Ray counts resources in ten-thousandths (FixedPoint); so do we, or 3 x 0.1 would not fit into 0.3.
_UNITS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementOptions:
    """What each rank's actor asks of Ray.

    Attributes:
        num_cpus_per_rank: May be a fraction, or 0 to reserve none.
        num_gpus_per_rank: A fraction of one GPU, or a whole number; unset = 1 where tensors go to a GPU, else none. With 0,
            ranks take the device that torch makes current: placing them is the caller's part then.
        resources: Custom resources of each rank.
        placement_group: The caller's; used, never removed. Without one, the group that the calling actor is in is used
            when it has room, else an own one is made.
        strategy: For an own placement group; "auto" is STRICT_PACK when one node can hold the group, else PACK.
        bundle_indices: Bundle of each rank in `placement_group`, in rank order; unset = whichever fit, ordered by node.
        label_selector: Node labels that an own placement group asks for, in Ray's syntax.
        runtime_env: Ray runtime environment of the actors.
        wait_for_nodes: Wait for nodes that are not there yet, as an autoscaling cluster needs, instead of refusing.

    Raises:
        SettingsError: A value cannot mean anything.
    """

    num_cpus_per_rank: float = 1
    num_gpus_per_rank: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    placement_group: PlacementGroup | None = None
    strategy: Strategy = "auto"
    bundle_indices: Sequence[int] | None = None
    label_selector: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = field(default=None, repr=False)  # may hold credentials
    wait_for_nodes: bool = False

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, Strategy)
        self._check_kinds()
        reserved = sorted({"CPU", "GPU", "memory", "object_store_memory"} & set(self.resources))
        if reserved:
            raise SettingsError(f"resources={dict(self.resources)!r} may not name {reserved}: Ray counts these itself")
        for name, amount in self._amounts().items():
            if isinstance(amount, bool) or not isinstance(amount, Real) or not math.isfinite(amount):
                raise SettingsError(f"{name}={amount!r} per rank: need a number")
            if amount != 0 and amount < 1 / _UNITS:
                raise SettingsError(f"{name}={amount!r} per rank: need 0 or at least {1 / _UNITS}")
        num_gpus = self.num_gpus_per_rank or 0
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise SettingsError(f"num_gpus_per_rank={self.num_gpus_per_rank!r}: above 1 it must be a whole number")
        if self.bundle_indices is not None and self.placement_group is None:
            raise SettingsError(f"bundle_indices={list(self.bundle_indices)!r} need the placement_group they belong to")
        if self.label_selector and self.placement_group is not None:
            raise SettingsError("label_selector is for an own placement group; the given one is placed already")

    def _check_kinds(self) -> None:
        """Refuses values that are not even of the right kind."""
        if not isinstance(self.resources, Mapping):
            raise SettingsError(f"resources are a mapping of name to amount, got {type(self.resources).__name__}")
        if not isinstance(self.label_selector, Mapping) or not all(
            isinstance(text, str) for label in self.label_selector.items() for text in label
        ):
            raise SettingsError(f"label_selector is a mapping of label to text, got {self.label_selector!r}")
        if not isinstance(self.runtime_env, Mapping | None):
            raise SettingsError(f"runtime_env is a mapping as Ray takes it, got {type(self.runtime_env).__name__}")
        if self.placement_group is not None and not hasattr(self.placement_group, "ready"):
            raise SettingsError(
                "placement_group is one that ray.util.placement_group(bundles) made, got "
                f"{type(self.placement_group).__name__}"
            )
        if self.bundle_indices is not None and not (
            isinstance(self.bundle_indices, Sequence)
            and all(isinstance(index, Integral) for index in self.bundle_indices)
        ):
            raise SettingsError(f"bundle_indices are a list of numbers of bundles, got {self.bundle_indices!r}")

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank reserves; empty when it reserves nothing."""
        return {name: amount for name, amount in self._amounts().items() if amount > 0}

    def for_device(self, *, is_gpu: bool) -> Self:
        """The same, with the number of GPUs decided."""
        return self if self.num_gpus_per_rank is not None else replace(self, num_gpus_per_rank=1 if is_gpu else 0)

    def _amounts(self) -> dict[str, float]:
        return {"CPU": self.num_cpus_per_rank, "GPU": self.num_gpus_per_rank or 0, **self.resources}


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """One node of the cluster, as far as placement cares.

    Attributes:
        node: How messages name it.
        resources: All that it has, free or not.
        num_ranks: How many ranks that would hold, beside what the calling actor holds.
        held: What the calling actor holds there.
    """

    node: str
    resources: Mapping[str, float]
    num_ranks: int
    held: Mapping[str, float] = field(default_factory=dict)


def count_ranks(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many times `bundle`, which is not empty, fits into `resources`.

    >>> count_ranks({"CPU": 2.0, "GPU": 8.0}, {"CPU": 0.5, "GPU": 1})
    4
    """
    return min(round(resources.get(name, 0) * _UNITS) // round(amount * _UNITS) for name, amount in bundle.items())


def choose_strategy(strategy: Strategy, rooms: Sequence[NodeRoom], num_ranks: int) -> str:
    """The strategy for Ray: "auto" keeps the group on one node when one can hold all of it."""
    if strategy != "auto":
        return strategy
    return "STRICT_PACK" if any(room.num_ranks >= num_ranks for room in rooms) else "PACK"


def check_room(strategy: str, rooms: Sequence[NodeRoom], num_ranks: int, bundle: Mapping[str, float]) -> None:
    """Refuse what all nodes together could not hold even when idle.

    Raises:
        ClusterError: Names need, room of each node and what to change.
    """
    sizes = [room.num_ranks for room in rooms]
    if strategy == "STRICT_PACK":
        fitting = max(sizes, default=0)
    elif strategy == "STRICT_SPREAD":
        fitting = sum(size > 0 for size in sizes)
    else:
        fitting = sum(sizes)
    if fitting >= num_ranks:
        return
    have = "; ".join(_describe_room(room, bundle) for room in rooms) or "none matches label_selector"
    nodes = "only node holds" if len(rooms) == 1 else f"{len(rooms)} nodes hold"
    advice = ["Use a smaller tp", "less per rank (num_cpus_per_rank=, num_gpus_per_rank=, resources=)"]
    if any(room.held for room in rooms):
        advice.append("num_cpus=0 for the calling actor, which holds its own as long as it lives")
    if len(rooms) > 1 and strategy.startswith("STRICT"):
        advice.append("another strategy")
    raise ClusterError(
        f"{counted(num_ranks, 'rank')} with {describe(bundle)} each, placed {strategy}, cannot fit: the cluster's {nodes} "
        f"{fitting} ({have}). {', '.join(advice)}, more nodes, or wait_for_nodes=True if nodes are still to come"
    )


def choose_bundles(sizes: Sequence[int], node_ids: Sequence[str], num_ranks: int) -> tuple[int, ...] | None:
    """Bundle index of `num_ranks` ranks, on as few nodes as possible; None when they do not fit.

    Args:
        sizes: How many ranks each bundle can hold.
        node_ids: Node of each bundle.
        num_ranks: How many ranks to place.

    >>> choose_bundles([1, 1, 1], ["a", "b", "b"], 2)
    (1, 2)
    """
    room = {node: sum(size for size, at in zip(sizes, node_ids, strict=True) if at == node) for node in node_ids}
    by_room = sorted(range(len(sizes)), key=lambda index: (-room[node_ids[index]], node_ids[index], index))
    seats = tuple(index for index in by_room for _ in range(sizes[index]))[:num_ranks]
    return seats if len(seats) == num_ranks else None


def order_by_node(node_ids: Sequence[str], *, first: str) -> tuple[int, ...]:
    """Positions in rank order: those on node `first`, then by node id, so that each node's ranks are contiguous.

    >>> order_by_node(["b", "a", "c", "a"], first="c")
    (2, 1, 3, 0)
    """
    return tuple(sorted(range(len(node_ids)), key=lambda i: (node_ids[i] != first, node_ids[i], i)))


def group_by_node(node_ids: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Ranks of each node, nodes in the order of their lowest rank.

    >>> group_by_node(["b", "b", "a"])
    ((0, 1), (2,))
    """
    nodes: dict[str, list[int]] = {}
    for rank, node_id in enumerate(node_ids):
        nodes.setdefault(node_id, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())


def describe(resources: Mapping[str, float]) -> str:
    """Amounts for a message, such as "CPU 0.5, GPU 1"."""
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items()) or "nothing reserved"


def _describe_room(room: NodeRoom, bundle: Mapping[str, float]) -> str:
    amounts = describe({name: room.resources.get(name, 0) for name in bundle})
    held = f", of which the calling actor holds {describe(room.held)}" if room.held else ""
    return f"{room.node} has {amounts}{held}: {counted(room.num_ranks, 'rank')}"
