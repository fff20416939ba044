"""What do the nodes of a running Ray cluster answer? One short task on each of them, all at the same time.

    connect      to a cluster that runs; none is started
    ask          a task on each node, which reserves nothing: it measures its way to this node, then looks around there
    wait         until all have answered, or for so long; who is silent by then is told

Data travels between nodes through Ray's object store, as the index of a load does: every node fetches the same object from this one.
Round trips are those of TCP connections to the port of this node's raylet, which is open to all nodes of a cluster.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_streamer.cluster.calls import Calls
from ray_streamer.cluster.clocks import bound_offset
from ray_streamer.cluster.connection import connect
from ray_streamer.cluster.facts import name_of_node
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ray_streamer.cluster.failures import FailedCall
    from ray_streamer.report.trace import ClockOffset

PARCEL_BYTES = 16 << 20
"""What every node fetches: much more than the messages about it."""

_NUM_ROUND_TRIPS = 8
_FETCH_SECONDS = 20.0
_CONNECT_SECONDS = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """A node of the cluster.

    Attributes:
        node_id: Ray's id, hexadecimal.
        address: Its IP address.
        hostname: Name of the machine.
        resources: All that it has, free or not.
        is_here: Whether this process runs on it.
    """

    node_id: str
    address: str
    hostname: str
    resources: Mapping[str, float] = field(default_factory=dict)
    is_here: bool = False

    @property
    def name(self) -> str:
        """The node as messages name it."""
        return name_of_node(self.hostname, self.address, self.node_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """The way from the driver's node to another one.

    Attributes:
        round_trip_seconds: Of the quickest of a few TCP connections; None where none came about.
        fetch_seconds: Until an object of `PARCEL_BYTES` was there; None where it did not come.
    """

    round_trip_seconds: float | None
    fetch_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReply(Generic[T]):
    """What came back from one node.

    Attributes:
        node: The node.
        answer: What it saw; None where no answer came.
        failure: Why none came; empty where one did.
        link: The way to it; None for this node, and where no answer came.
        clock: Its time of day compared with this node's; None as `link` is.
    """

    node: ClusterNode
    answer: T | None = None
    failure: str = ""
    link: LinkSpeed | None = None
    clock: ClockOffset | None = None


def ask_nodes(
    look: Callable[[ClusterNode], Callable[[], T]],
    *,
    address: str,
    connect_timeout_seconds: float,
    timeout_seconds: float,
) -> list[NodeReply[T]]:
    """Lets every live node of a running cluster look around, and waits until all have answered or the time is over.

    Args:
        look: For a node, what is called there: it is pickled, and so is what it returns.
        address: `host:port` or "auto".
        connect_timeout_seconds: How long the cluster's address may take to answer.
        timeout_seconds: How long the nodes may take, all of them together.

    Raises:
        ClusterError: No cluster can be reached there.
    """
    if address == "local":
        raise ClusterError('address="local" names no running cluster: give its host:port, or "auto"')
    connection = connect(address, connect_timeout_seconds=connect_timeout_seconds)
    try:
        return _ask(look, timeout_seconds)
    finally:
        connection.close()


def _ask(look: Callable[[ClusterNode], Callable[[], T]], timeout_seconds: float) -> list[NodeReply[T]]:
    here = ray.get_runtime_context().get_node_id()
    entries = sorted((entry for entry in ray.nodes() if entry["Alive"]), key=lambda entry: entry["NodeID"] != here)
    nodes = [_node(entry, here) for entry in entries]
    door = next((each["NodeManagerAddress"], each["NodeManagerPort"]) for each in entries if each["NodeID"] == here)
    parcel = ray.put(bytes(PARCEL_BYTES))
    sent = time.time()
    refs = {
        number: _task.options(
            name=f"ray_streamer doctor on {node.address}",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        ).remote(look(node), None if node.is_here else door, [parcel])
        for number, node in enumerate(nodes)
    }
    calls, received = _collect(refs, timeout_seconds)
    failed = {failure.rank: failure for failure in calls.failures}
    replies: list[NodeReply[T]] = []
    for number, node in enumerate(nodes):
        if number in calls.results:
            replies.append(_reply(node, calls.results[number], sent, received[number]))
        else:
            why = _words(failed[number]) if number in failed else f"no answer within {timeout_seconds:g} s"
            replies.append(NodeReply(node=node, failure=why))
    return replies


def _node(entry: Mapping[str, Any], here: str) -> ClusterNode:
    return ClusterNode(
        node_id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        hostname=entry["NodeManagerHostname"],
        resources=dict(entry["Resources"]),
        is_here=entry["NodeID"] == here,
    )


def _collect(refs: dict[int, ray.ObjectRef[Any]], timeout_seconds: float) -> tuple[Calls, dict[int, float]]:
    """What came in time, and the time of day at which each answer was there; the other tasks are ended."""
    calls = Calls(refs)
    received: dict[int, float] = {}
    deadline = time.monotonic() + timeout_seconds
    while calls.pending and (remaining := deadline - time.monotonic()) > 0:
        calls.collect(remaining)
        now = time.time()
        for number in calls.results:
            received.setdefault(number, now)
    for number in calls.pending:
        ray.cancel(refs[number], force=True)
    return calls, received


def _reply(node: ClusterNode, answer: _Answer, sent: float, received: float) -> NodeReply[Any]:
    if node.is_here:
        return NodeReply(node=node, answer=answer.seen)
    clock = bound_offset(sent=sent, began=answer.began, ended=answer.ended, received=received)
    return NodeReply(node=node, answer=answer.seen, link=answer.link, clock=clock)


def _words(failure: FailedCall) -> str:
    cause = failure.cause
    return f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else cause


@dataclass(frozen=True, slots=True)
class _Answer:
    began: float
    link: LinkSpeed | None
    seen: Any
    ended: float


def _look_there(look: Callable[[], Any], door: tuple[str, int] | None, parcel: Sequence[ray.ObjectRef[Any]]) -> _Answer:
    """Runs on the node; `door` is where the driver's node listens, None on that node."""
    began = time.time()
    link = None
    if door is not None:
        link = LinkSpeed(round_trip_seconds=_round_trip(door), fetch_seconds=_fetch(parcel[0]))
    seen = look()
    return _Answer(began, link, seen, time.time())


_as_task: Any = ray.remote
_task = _as_task(num_cpus=0, max_retries=0)(_look_there)


def _round_trip(door: tuple[str, int]) -> float | None:
    # A connection is there when the answer to its first packet is.
    took: list[float] = []
    try:
        for _ in range(_NUM_ROUND_TRIPS):
            began = time.perf_counter()
            socket.create_connection(door, _CONNECT_SECONDS).close()
            took.append(time.perf_counter() - began)
    except OSError:
        return None
    return min(took)


def _fetch(parcel: ray.ObjectRef[Any]) -> float | None:
    began = time.perf_counter()
    try:
        ray.get(parcel, timeout=_FETCH_SECONDS)
    except RayError:
        return None
    return time.perf_counter() - began
