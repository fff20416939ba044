"""What does one rank of a group do? Agree with its neighbours, load its own part, run the caller's functions beside the tensors.

    made     the device begins to come up, and with it torch's import
    agree    the ranks of the node meet, say what they hold and get their parts of the node's plan; needs no torch
    load     reads into staging memory until the device is there, then fills the tensors

The ranks stay met: `agree` and `load` may follow again, and then fill the same tensors. Staging memory is there during a load only.

An ordinary object: the group wraps it in an actor, tests do not. `abort`, `progress` and `pulse` may be called from another thread
while `agree` or `load` runs; everything else is called one at a time.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.index_bytes import index_to_bytes
from ray_streamer.cluster import meters
from ray_streamer.cluster.clocks import read_clock
from ray_streamer.cluster.gpus import assigned_device
from ray_streamer.device import open_device
from ray_streamer.errors import ClusterError, LoadAbortedError
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.agreement import agree
from ray_streamer.rank.conditions import reads_in_flight
from ray_streamer.rank.context import RankContext
from ray_streamer.rank.load import RankLoad
from ray_streamer.rank.refill import tensors_to_fill
from ray_streamer.report.metering import failures_metered, metered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from ray_streamer.cluster.clocks import ClockReading
    from ray_streamer.exchange.messages import Pulse
    from ray_streamer.exchange.place import Place
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.agreement import MemoryTerms
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.report.metering import Meter
    from ray_streamer.slices import RankSlices


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDigest:
    """What a rank tells of its part of the plan.

    Attributes:
        node_plan_hash: Of what its node reads.
        slices_hash: Of what it holds.
        needed_bytes: Bytes of the checkpoint that its node wants.
        agreement: Names this agreement, on this rank: what `load` is given.
    """

    node_plan_hash: str
    slices_hash: str
    needed_bytes: int
    agreement: str


class LoadWorker:
    """One rank.

    Args:
        rank: Global rank.
        request: What to load, and how.

    Raises:
        DeviceError: What Ray assigned to this rank is hidden from it.
    """

    def __init__(self, rank: int, request: LoadRequest) -> None:
        self._rank = rank
        self._request = request
        self._device_name = assigned_device(request.device)
        self._device = request.start_device(self._device_name, owns_process=True)
        self._lock = threading.Lock()
        self._session: NodeSession | None = None
        self._is_loading = False
        self._agreed: RankPlan | None = None
        self._agreement = ""
        self._slices: RankSlices | None = None
        self._memory_limit = 0
        self._load: RankLoad | None = None
        self._abort_reason: str | None = None
        self._context: RankContext | None = None

    @property
    def session(self) -> NodeSession | None:
        """The session with the other ranks of this node; None before they met, and after a failure."""
        return self._session

    def close(self) -> None:
        """Leaves the session; the tensors stay."""
        self._leave()

    def read_index(self, request: LoadRequest) -> bytes:
        """The headers of a request's checkpoint, as they travel to all ranks.

        Raises:
            CheckpointError: The checkpoint is malformed.
            StorageError: Headers could not be read.
        """
        return index_to_bytes(request.open_index())

    def slices(self) -> RankSlices:
        """What this rank said at the last agreement, for looking at where the driver cannot know it.

        Raises:
            ClusterError: It has agreed on nothing.
        """
        if self._slices is None:
            raise ClusterError(f"rank {self._rank} was restarted and not loaded")
        return self._slices

    def agree(self, request: LoadRequest, index_bytes: bytes, place: Place, terms: MemoryTerms) -> PlanDigest:
        """Meets the ranks of this node, unless they are met, and agrees with them on what each of them reads.

        Args:
            request: What to load; its mesh, settings and device are those that this worker was made with.
            index_bytes: The checkpoint's, equal on all ranks.
            place: Which rank this is, and who the others are.
            terms: How much memory this rank may stage in.

        Raises:
            LoadAbortedError: `abort` was called.
            RankFailedError: A neighbour failed.
            RayStreamerError: The checkpoint cannot be planned so; the same error on all ranks of the node.
        """
        session = self._join(place)
        with self._failures_published(session), self._ended_on_failure(session):
            session.wait_met()
            storage = request.open_storage(num_sharers=len(place.ranks))
            with contextlib.closing(storage):
                agreement = agree(
                    session,
                    request,
                    storage,
                    index_bytes=index_bytes,
                    terms=terms,
                    held=self._held(),
                    imports_torch=self._device.is_under_way,
                )
        self._request, self._agreed, self._memory_limit = request, agreement.plan, agreement.memory_limit
        self._slices, self._agreement = agreement.slices, secrets.token_hex(8)
        node_plan = agreement.plan.node_plan
        return PlanDigest(
            node_plan_hash=node_plan.plan_hash,
            slices_hash=agreement.slices.fingerprint(),
            needed_bytes=node_plan.needed_bytes,
            agreement=self._agreement,
        )

    def load(self, agreement: str) -> RankStatistics:
        """Loads this rank's tensors, as agreed, and keeps them; earlier ones of the same form are filled, others dropped first.

        Args:
            agreement: Which one, by the name in its `PlanDigest`; it is loaded once.

        Raises:
            ClusterError: That is not the last one of this rank, or its load has begun already.
            LoadAbortedError: `abort` was called.
            DeviceError: The device cannot be used.
            RankFailedError: A neighbour failed.
            StorageError: A read of this rank failed.
        """
        session, mine = self._session, self._agreed
        if session is None or mine is None or agreement != self._agreement:
            raise ClusterError(
                f"rank {self._rank} agreed on another load meanwhile, or left this one: two loads of these ranks at once; begin one "
                "when the other has ended"
            )
        self._agreed = None
        # From here on nobody sees tensors until all of them are whole.
        earlier, self._context = self._context, None
        self._load = None
        storage = self._request.open_storage(num_sharers=len(mine.ranks))
        with self._failures_published(session), contextlib.closing(storage), self._ended_on_failure(session):
            out = self._tensors_to_fill(earlier, mine)
            del earlier
            self._load = load = RankLoad(
                mine,
                storage,
                self._device,
                session,
                concurrency=reads_in_flight(self._request.settings, storage),
                memory_limit=self._memory_limit,
                out=out,
            )
            del out
            with metered(self._meter(), load, uri=self._request.uri, node=session.place.node, rank=self._rank):
                tensors = load.run()
        with self._lock:
            self._is_loading = False
        device = self._device.opened
        assert device is not None
        self._context = RankContext(
            rank=self._rank, mesh=self._request.mesh, device=device.name, node=session.place.node, tensors=tensors
        )
        return load.statistics()

    def _held(self) -> Mapping[str, Any]:
        """Tensors that the next load fills, or that are dropped before it."""
        return {} if self._context is None else self._context.tensors

    def _tensors_to_fill(self, earlier: RankContext | None, mine: RankPlan) -> dict[str, torch.Tensor]:
        device = self._device.opened
        return {} if earlier is None or device is None else tensors_to_fill(earlier.tensors, mine.results, device)

    def forget_abort(self) -> None:
        """An abort that was meant for an earlier call ends nothing any more."""
        with self._lock:
            self._abort_reason = None

    def _join(self, place: Place) -> NodeSession:
        session = self._session
        if session is None or session.place != place or session.stop.is_set:
            self._leave()
            session = NodeSession(place)
        with self._lock:
            self._session, self._is_loading = session, True
            if self._abort_reason is not None:
                session.fail(LoadAbortedError(self._abort_reason))
        return session

    def _failures_published(self, session: NodeSession) -> contextlib.AbstractContextManager[None]:
        return failures_metered(self._meter(), uri=self._request.uri, node=session.place.node, rank=self._rank)

    def _meter(self) -> Meter | None:
        return meters.find_meter(is_wanted=self._request.settings.metrics)

    @contextlib.contextmanager
    def _ended_on_failure(self, session: NodeSession) -> Iterator[None]:
        """An error that leaves the block ends the session for all."""
        try:
            yield
        except BaseException as error:
            session.fail(error)
            self._leave()
            raise

    def _leave(self) -> None:
        with self._lock:
            session, self._session, self._is_loading = self._session, None, False
        if session is not None:
            session.close()

    def abort(self, reason: str) -> None:
        """Ends the load under way, or the next one."""
        with self._lock:
            self._abort_reason = reason
            if self._session is not None and self._is_loading:
                self._session.fail(LoadAbortedError(reason))

    def progress(self) -> RankStatistics | None:
        """What the load has done so far; None before it began."""
        load = self._load
        return None if load is None else load.statistics()

    def pulse(self) -> Pulse | None:
        """How this rank gets on with the load that it takes part in; None between loads."""
        with self._lock:
            session = self._session if self._is_loading else None
        return None if session is None else session.activity.pulse()

    def trace(self) -> RankTrace:
        """What happened to each block of the last load, and when.

        Raises:
            ClusterError: There was none.
        """
        if self._load is None:
            raise ClusterError(f"rank {self._rank} has loaded nothing that could be drawn")
        return self._load.trace()

    def clock(self) -> ClockReading:
        """This machine's clock, for comparison with the driver's."""
        return read_clock()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Calls `function(context, *args)` beside the tensors."""
        try:
            return function(self._loaded(), *args)
        finally:
            # An abort meant for this call, since another rank's function failed, ends nothing.
            with self._lock:
                self._abort_reason = None

    def take_bytes(self, name: str) -> bytes:
        """The bytes of this rank's slice of a tensor.

        Raises:
            ClusterError: A function that ran here took the tensor away.
        """
        tensor: torch.Tensor | None = self._loaded().tensors.get(name)
        if tensor is None:
            raise ClusterError(f"rank {self._rank} holds {name!r} no longer: a function took it out of context.tensors")
        result = open_device("cpu").result(tensor.cpu().contiguous())
        return result.host_bytes().tobytes()

    def _loaded(self) -> RankContext:
        if self._context is None:
            raise ClusterError(
                f"rank {self._rank} holds no tensors: its load failed, or it was restarted and not loaded"
            )
        return self._context
