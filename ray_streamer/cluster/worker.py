"""What does one rank of a group do? Load its own part, run the caller's functions beside the tensors.

An ordinary object: the group wraps it in an actor, tests do not. `abort` and `progress` may be called from another thread
while `load` runs; everything else is called one at a time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ray_streamer.cluster.gpus import assigned_device
from ray_streamer.device import open_device
from ray_streamer.errors import ClusterError, LoadAbortedError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.planning.node_plan import plan_node
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.rank.context import RankContext
from ray_streamer.rank.load import RankLoad
from ray_streamer.rank.options import RankOptions
from ray_streamer.slices.rank_sources import RankSources

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics


class LoadWorker:
    """One rank.

    Args:
        rank: Global rank.
        request: What to load, and how.

    Raises:
        DeviceError: The device cannot be used.
    """

    def __init__(self, rank: int, request: LoadRequest) -> None:
        self._rank = rank
        self._request = request
        # Opened here, so that what the device imports and starts is done, and refused, before anything is read.
        # A GPU starts in the background, while the headers are read and the plan is made.
        self._device = request.open_device(assigned_device(request.device))
        self._lock = threading.Lock()
        self._load: RankLoad | None = None
        self._abort_reason: str | None = None
        self._context: RankContext | None = None

    def load(self, plan: ReadPlan, session: str, node: str, memory_limit: int) -> RankStatistics:
        """Loads this rank's tensors and keeps them; its own earlier ones are dropped first.

        Args:
            plan: Equal on all ranks.
            session: Secret shared by the ranks of this load.
            node: Name of this rank's node, for errors.
            memory_limit: Staging bytes, or -1.

        Raises:
            LoadAbortedError: `abort` was called.
            RankFailedError: A neighbour failed.
            StorageError: A read of this rank failed.
        """
        # Several nodes may share a machine, and with it the names of sockets.
        session = f"{session}/{plan.topology.node_of(self._rank)}"
        return self._load_plan(plan.rank_plan(self._rank), session, node, memory_limit)

    def load_alone(self, plan: ReadPlan, session: str, node: str, memory_limit: int) -> RankStatistics:
        """Loads this rank's tensors with nobody's help: the others have theirs. The same objects as in `plan`, or none."""
        said = plan.slices[self._rank]
        alone = plan_node(plan.index, [RankSources.of(said)], plan.limits)
        mine = RankPlan.of(plan.index, alone, said, ranks=(self._rank,), local_rank=0)
        return self._load_plan(mine, session, node, memory_limit)

    def _load_plan(self, mine: RankPlan, session: str, node: str, memory_limit: int) -> RankStatistics:
        self._context = None
        options = RankOptions(
            session=session,
            node=node,
            concurrency=self._request.settings.concurrency,
            memory_limit=memory_limit,
            timeouts=Timeouts.of(self._request.settings),
        )
        storage = self._request.open_storage(num_sharers=len(mine.ranks))
        try:
            load = RankLoad(mine, storage, self._device, options)
            self._begin(load)
            tensors = load.run()
        finally:
            storage.close()
        self._context = RankContext(
            rank=self._rank, mesh=self._request.mesh, device=self._device.name, node=node, tensors=tensors
        )
        return load.statistics()

    def _begin(self, load: RankLoad) -> None:
        with self._lock:
            self._load = load
            if self._abort_reason is not None:
                load.abort(LoadAbortedError(self._abort_reason))

    def abort(self, reason: str) -> None:
        """Ends the load under way, or the next one."""
        with self._lock:
            self._abort_reason = reason
            if self._load is not None:
                self._load.abort(LoadAbortedError(reason))

    def progress(self) -> RankStatistics | None:
        """What the load has done so far; None before it began."""
        load = self._load
        return None if load is None else load.statistics()

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
        assert result.host_bytes is not None
        return result.host_bytes.tobytes()

    def _loaded(self) -> RankContext:
        if self._context is None:
            raise ClusterError(
                f"rank {self._rank} holds no tensors: its load failed, or it was restarted and not loaded"
            )
        return self._context
