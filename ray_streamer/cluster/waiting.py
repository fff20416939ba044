"""Room for the ranks is taken, or ranks are slow to start: who is waited for, and how does the caller know meanwhile?

A placement group that gets no room is told after a second, and again while the wait lasts: what is missing, who holds
it, and what to do. The error at the end says the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import ray._private.state
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from ray_streamer.cluster.placement import describe
from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ray.util.placement_group import PlacementGroup

    from ray_streamer.cluster.calls import Calls

logger = logging.getLogger(__name__)

# A new group is ready within a few tenths of a second where there is room.
_FIRST_NEWS_SECONDS = 1.0
_MOST_SECONDS_BETWEEN_NEWS = 30.0
_MOST_HOLDERS = 4
_LOOK_SECONDS = 0.2
SLOW_START_SECONDS = 20.0
"""After so long a wait for something slow is told. Importing torch takes several seconds, on a busy node longer."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment that everything in one start must meet.

    Attributes:
        timeout_seconds: The whole allowance, for messages.
        started: When it began, on the monotonic clock.
        is_called_off: Whether nobody wants the start any more.
    """

    timeout_seconds: float
    started: float = field(default_factory=time.monotonic)
    is_called_off: Callable[[], bool] = bool

    @property
    def remaining_seconds(self) -> float:
        """What is left, never below 0."""
        return max(0.0, self.started + self.timeout_seconds - time.monotonic())

    def check(self) -> None:
        """End a wait for what nobody wants any more.

        Raises:
            ClusterError: The start was called off.
        """
        if self.is_called_off():
            raise ClusterError("the start of these ranks was called off")


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who has reserved what is missing.

    Attributes:
        name: How messages name it.
        amounts: What it holds of it.
        is_ours: A model that this process loaded.
    """

    name: str
    amounts: Mapping[str, float]
    is_ours: bool = False

    def __str__(self) -> str:
        return f"{self.name} holds {describe(self.amounts)}"


class News:
    """When to say again that something is still awaited: after a second, then less and less often."""

    def __init__(self, first_seconds: float = _FIRST_NEWS_SECONDS) -> None:
        self._started = time.monotonic()
        self._next_seconds = first_seconds

    @property
    def waited_seconds(self) -> float:
        """How long it lasts already."""
        return time.monotonic() - self._started

    def is_due(self) -> bool:
        """Whether it is time; then not again for a while."""
        waited = self.waited_seconds
        if waited < self._next_seconds:
            return False
        self._next_seconds = waited + min(_MOST_SECONDS_BETWEEN_NEWS, max(4.0, waited))
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomWanted:
    """What a group of ranks waits for.

    Attributes:
        label: What the ranks hold.
        num_ranks: How many.
        bundle: What each needs.
        strategy: How they are placed.
        ours: Placement groups that this process holds: id -> what is in them.
        who: How messages call the ranks; by their number when unset.
    """

    label: str
    num_ranks: int
    bundle: Mapping[str, float]
    strategy: str
    ours: Mapping[str, str] = field(default_factory=dict)
    who: str = ""


def wait_for_room(group: PlacementGroup, wanted: RoomWanted, deadline: Deadline) -> None:
    """Wait until Ray has reserved a placement group; say who holds the room while that lasts.

    Raises:
        ClusterError: The group was removed.
        StartupTimeoutError: It got no room in time.
    """
    ready = group.ready()
    news = News()
    while True:
        deadline.check()
        is_ready = bool(ray.wait([ready], timeout=min(0.5, deadline.remaining_seconds))[0])
        state = placement_group_state(group)
        # A group that is removed counts as ready, and actors in it would wait for ever.
        if state == "REMOVED":
            raise ClusterError(
                f"placement group {group.id.hex()} was removed before its {counted(wanted.num_ranks, 'rank')} could start"
            )
        if is_ready and state == "CREATED":
            return
        if is_ready:  # It was, and lost a node since.
            time.sleep(_LOOK_SECONDS)
        if not deadline.remaining_seconds:
            raise StartupTimeoutError(
                f"{wanted.label}: {_missing(wanted)} within startup_timeout_seconds={deadline.timeout_seconds:g}. "
                f"{_who_and_what(group, wanted)}, or raise startup_timeout_seconds"
            )
        if news.is_due():
            logger.warning(
                "%s: %s for %.0f s; waiting for %.0f s more (startup_timeout_seconds=%g). %s",
                wanted.label,
                _missing(wanted),
                news.waited_seconds,
                deadline.remaining_seconds,
                deadline.timeout_seconds,
                _who_and_what(group, wanted),
            )


def placement_group_state(group: PlacementGroup) -> str:
    """Ray's word for it: PENDING, CREATED, RESCHEDULING after it lost a node, or REMOVED."""
    return placement_group_table(group).get("state", "REMOVED")


def wait_for_start(
    calls: Calls,
    places: Sequence[str],
    label: str,
    deadline: Deadline,
    *,
    doing: str = "start",
    why_silent: Callable[[Sequence[int]], str | None] = lambda _: None,
) -> None:
    """Wait until every rank has answered or one has failed; say who is silent while that lasts.

    Args:
        calls: One call to each rank that starts.
        places: Every rank and its place, as messages name them.
        label: What the ranks hold.
        deadline: Until when.
        doing: What they were asked for.
        why_silent: For ranks that have not answered, why and what to do, where that is known.

    Raises:
        StartupTimeoutError: Ranks did not answer in time; names them.
    """
    news = News(SLOW_START_SECONDS)
    while calls.pending and not calls.failures:
        deadline.check()
        calls.collect(min(1.0, deadline.remaining_seconds))
        if not calls.pending or calls.failures:
            return
        silent = "; ".join(places[rank] for rank in calls.pending)
        if not deadline.remaining_seconds:
            advice = why_silent(calls.pending) or (
                "`ray list actors` shows what they wait for; raise startup_timeout_seconds if it is only slow"
            )
            raise StartupTimeoutError(
                f"{len(calls.pending)} of {counted(len(places), 'rank')} did not {doing} within "
                f"startup_timeout_seconds={deadline.timeout_seconds:g}: {silent}. {advice}",
                sorted(calls.pending),
            )
        if news.is_due():
            why = why_silent(calls.pending)
            logger.warning(
                "%s: did not %s yet after %.0f s: %s; waiting for %.0f s more (startup_timeout_seconds=%g)",
                label,
                doing,
                news.waited_seconds,
                silent if why is None else f"{silent}. {why}",
                deadline.remaining_seconds,
                deadline.timeout_seconds,
            )


def _missing(wanted: RoomWanted) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    ranks = wanted.who or ("the only rank" if wanted.num_ranks == 1 else f"the {counted(wanted.num_ranks, 'rank')}")
    state = ", ".join(
        f"{name} {need * wanted.num_ranks:g} needed, {free.get(name, 0):g} of {total.get(name, 0):g} free"
        for name, need in wanted.bundle.items()
    )
    return f"no room for {ranks} ({state})"


def _who_and_what(group: PlacementGroup, wanted: RoomWanted) -> str:
    """Who holds what is missing, and what would end the wait."""
    holders = find_room_holders(wanted.bundle, ours=wanted.ours, without=group.id.hex())
    known = "; ".join(map(str, holders[:_MOST_HOLDERS]))
    more = f"; and {len(holders) - _MOST_HOLDERS} more" if len(holders) > _MOST_HOLDERS else ""
    advice: list[str] = []
    if any(holder.is_ours for holder in holders):
        advice.append("call shutdown() on a model that is not needed any more, or load it in a with block")
    elif holders:
        advice.append("end what holds the rest")
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if wanted.strategy == "STRICT_PACK" and num_nodes > 1:
        advice.append('allow several nodes with strategy="PACK"')
    if not advice:
        advice.append("add nodes")
    sentence = ", or ".join(advice)
    return f"{known}{more}. {sentence[0].upper()}{sentence[1:]}" if known else f"{sentence[0].upper()}{sentence[1:]}"


def find_room_holders(wanted: Mapping[str, float], *, ours: Mapping[str, str], without: str) -> list[Holder]:
    """Who has reserved any of the wanted resources, those of this process first, then by how much.

    Args:
        wanted: Names of resources.
        ours: Placement groups that this process holds: id -> what is in them.
        without: Placement group that does not count.
    """
    found = [*_group_holders(ours, without), *_actor_holders()]
    holding = [
        Holder(holder.name, {name: holder.amounts[name] for name in wanted if holder.amounts.get(name)}, holder.is_ours)
        for holder in found
    ]
    return sorted(
        (holder for holder in holding if holder.amounts),
        key=lambda holder: (not holder.is_ours, -sum(holder.amounts.values()), holder.name),
    )


def _group_holders(ours: Mapping[str, str], without: str) -> Iterator[Holder]:
    for group_id, entry in placement_group_table().items():
        if entry["state"] != "CREATED" or group_id == without:
            continue
        amounts: Counter[str] = Counter()
        for bundle in entry["bundles"].values():
            amounts.update(bundle)
        if group_id in ours:
            yield Holder(f"{ours[group_id]}, loaded by this process,", amounts, is_ours=True)
        else:
            yield Holder(f"placement group {entry['name'] or group_id}", amounts)


def _actor_holders() -> Iterator[Holder]:
    """Actors outside of placement groups."""
    for actor in _live_actors():
        if not actor.placement_group_id:
            name = actor.name or actor.class_name
            yield Holder(f"actor {name} (pid {actor.pid})", dict(actor.required_resources))


def _live_actors() -> Sequence[Any]:
    """Ray's records of living actors; none where this version of Ray does not give them."""
    # Private: the public list_actors needs a dashboard, which a local Ray does not have.
    try:
        from ray.core.generated import gcs_pb2

        accessor = ray._private.state.state._connect_and_get_accessor()  # pyright: ignore[reportPrivateUsage]
        return [gcs_pb2.ActorTableData.FromString(record) for record in accessor.get_actor_table(None, "ALIVE")]  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf at run time
    except (AttributeError, ImportError, TypeError, RayError) as error:
        logger.debug("Ray does not list its actors: %s", error)
        return []
