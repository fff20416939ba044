"""How does one rank's load run, from the call to its last tensor? Ranks met, agreed with, then tensors as they become complete."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray_streamer.errors import ClusterError, LoadAbortedError, SettingsError
from ray_streamer.exchange.session import NodeSession
from ray_streamer.process_limits import limits_explained
from ray_streamer.rank.agreed_load import agreed_load
from ray_streamer.rank.background import BackgroundLoad

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from ray_streamer.api.arguments import DeviceLike, Sharding
    from ray_streamer.api.dtensors import DTensorSlices
    from ray_streamer.api.membership import Membership
    from ray_streamer.api.node_trace import NodeTrace
    from ray_streamer.exchange.place import Place
    from ray_streamer.rank.background import Items
    from ray_streamer.rank.load import RankLoad
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCall:
    """What one rank was asked to load, and how.

    Attributes:
        uri: The checkpoint.
        sharding: Which part of it.
        find_membership: Says which rank this is, among which others.
        settings: Every knob.
        device: Where the tensors go.
        out: Tensors that are filled, by name.
        on_statistics: Who is told what the load did.
        progress: Whether rank 0 shows how far it is.
        trace: Where it is drawn.
        as_dtensor: Over which ranks results are DTensors; None where they are plain tensors.

    Raises:
        SettingsError: `out` is no mapping of names, or `on_statistics` no function.
    """

    uri: UrisLike
    sharding: Sharding
    find_membership: Callable[[], Membership]
    settings: Settings
    device: DeviceLike
    out: Mapping[str, torch.Tensor] | None
    on_statistics: Callable[[RankStatistics], None] | None
    progress: bool
    trace: str | os.PathLike[str] | None
    as_dtensor: DeviceMesh | None

    def __post_init__(self) -> None:
        if self.out is not None and not isinstance(self.out, Mapping):
            raise SettingsError(f"out is a mapping of name to tensor, got {type(self.out).__name__}")
        for name in self.out or ():
            if not isinstance(name, str):
                raise SettingsError(f"out is a mapping of name to tensor, got a name that is {type(name).__name__}")
        if self.on_statistics is not None and not callable(self.on_statistics):
            raise SettingsError(f"on_statistics is a function, got {type(self.on_statistics).__name__}")


class RankStream(Iterator[tuple[str, "torch.Tensor"]]):
    """The tensors of one rank as they become complete; made by `stream_rank`.

    Threads that take from one stream take turns. The process in which the load began takes all of it. A stream that was closed or failed
    before its end raises an error for everybody who takes from it, rather than end as a complete one.
    """

    def __init__(self, call: RankCall) -> None:
        self._call = call
        self._taking = threading.RLock()
        self._process: int | None = None
        self._running: BackgroundLoad | None = None
        self._load: RankLoad | None = None
        self._is_over = self._is_complete = False
        self._taken: deque[tuple[str, torch.Tensor]] = deque()
        self._placed: DTensorSlices | None = None

    def __next__(self) -> tuple[str, torch.Tensor]:
        """The next complete tensor; waits for it."""
        if self._process not in (None, os.getpid()):
            raise ClusterError(
                f"process {self._process} began this load and has its threads; a process forked from it takes no tensors of it: "
                "call stream_rank or load_rank in the forked process"
            )
        with self._taking:
            return self._take()

    def _take(self) -> tuple[str, torch.Tensor]:
        if self._is_complete:
            raise StopIteration
        if self._is_over:
            raise LoadAbortedError("the stream was closed, or its load failed, before its last tensor was taken")
        if self._taken:
            return self._taken.popleft()
        try:
            items = self._begun().take()
        except BaseException:
            self.close()
            raise
        if items is not None:
            placed = self._placed
            self._taken.extend(items if placed is None else [(name, placed.wrap(name, local)) for name, local in items])
            return self._taken.popleft()
        self._is_over = self._is_complete = True
        if self._call.on_statistics is not None and self._load is not None:
            self._call.on_statistics(self._load.statistics())
        raise StopIteration

    def _begun(self) -> BackgroundLoad:
        """The load, which begins when it is first asked for."""
        if self._running is None:
            self._process = os.getpid()
            self._placed, self._load, self._running = _begin(self._call)
            if self._is_over:
                self._running.end()
                raise LoadAbortedError("the stream was closed by another thread while its load began")
        return self._running

    def close(self) -> None:
        """Ends the load, if it is under way, and waits until nothing of it is left."""
        if not self._is_over:
            self._is_over = True
            self._taken.clear()
            if self._running is not None:
                self._running.end()

    def __del__(self) -> None:
        """Ends the load; the collector may call this in a thread of the load itself."""
        if not self._is_over and self._running is not None:
            self._running.drop()


def _request_of(call: RankCall, membership: Membership) -> tuple[LoadRequest, DTensorSlices | None]:
    """What is asked for, and what knows the placements of the results, where they are to be DTensors."""
    request = call.sharding.request(
        call.uri, settings=call.settings, device=call.device, num_ranks=membership.topology.num_ranks
    )
    placed = None
    if call.as_dtensor is not None:
        from ray_streamer.api.dtensors import DTensorSlices

        placed = DTensorSlices(request.slices, call.as_dtensor, device=request.device)
        request = replace(request, slices=placed)
    if call.out is not None:
        from ray_streamer.rank.given_memory import into_given

        request = replace(request, slices=into_given(request.slices, call.out))
    return request, placed


# Modules that only some loads need are imported in it, which takes a descriptor.
@limits_explained("begin a load")
def _begin(call: RankCall) -> tuple[DTensorSlices | None, RankLoad, BackgroundLoad]:
    """Meets the other ranks, agrees with them and starts the load."""
    membership = call.find_membership()
    request, placed = _request_of(call, membership)
    place = membership.place(request.settings)
    completed: queue.SimpleQueue[Items | BaseException | None] = queue.SimpleQueue()
    with _failures_published(request, place), contextlib.ExitStack() as owned:
        index_bytes = membership.read_index(request)
        follow = _display(owned, request.uri, is_shown=call.progress and membership.rank == 0)
        # The others are looked for while device and storage are opened; what fails there is told to them.
        session = owned.enter_context(NodeSession(place))
        trace = _trace_of(call, membership)
        device = request.start_device(request.device)
        storage = request.open_storage(num_sharers=len(membership.local_ranks))
        owned.callback(storage.close)
        load = agreed_load(
            session, request, storage, device, index_bytes=index_bytes, out=call.out, on_complete=completed.put
        )
        follow(load)

        def run() -> None:
            with _failures_published(request, place), _published(load, request, place):
                load.run()
            if trace is not None:
                trace.write(session, load, uri=request.uri)

        def abort(error: BaseException) -> None:
            load.abort(error)
            # It wakes threads that wait for a network.
            storage.close()

        def close(error: BaseException | None) -> None:
            held.__exit__(type(error) if error is not None else None, error, None)

        held = owned.pop_all()
        try:
            return placed, load, BackgroundLoad(membership.rank, run=run, abort=abort, close=close, completed=completed)
        except BaseException as error:
            close(error)
            raise


def _trace_of(call: RankCall, membership: Membership) -> NodeTrace | None:
    """The trace that was asked for."""
    if call.trace is None:
        return None
    from ray_streamer.api.node_trace import NodeTrace

    return NodeTrace.of(call.trace, membership)


def _published(load: RankLoad, request: LoadRequest, place: Place) -> contextlib.AbstractContextManager[None]:
    """For the length of the block, which runs the load, its metrics are published where the settings want them."""
    if not request.settings.metrics:
        return contextlib.nullcontext()
    from ray_streamer.cluster.meters import find_meter
    from ray_streamer.report.metering import metered

    return metered(find_meter(is_wanted=True), load, uri=request.uri, node=place.node, rank=place.rank)


def _failures_published(request: LoadRequest, place: Place) -> contextlib.AbstractContextManager[None]:
    """An error that leaves the block is counted where the settings want metrics."""
    if not request.settings.metrics:
        return contextlib.nullcontext()
    from ray_streamer.cluster.meters import find_meter
    from ray_streamer.report.metering import failures_metered

    return failures_metered(find_meter(is_wanted=True), uri=request.uri, node=place.node, rank=place.rank)


def _display(owned: contextlib.ExitStack, uri: str, *, is_shown: bool) -> Callable[[RankLoad], object]:
    """Shows how far a rank is, from now on until `owned` ends; what it gives is told of the load when there is one."""
    if not is_shown:
        return lambda _: None
    from ray_streamer.report.progress import LoadProgress

    loads: list[RankLoad] = []
    display = owned.enter_context(LoadProgress(uri, ask=lambda: [load.statistics() for load in loads]))
    display.phase("plan")

    def follow(load: RankLoad) -> None:
        loads.append(load)
        display.phase("load")

    return follow
