"""What does the caller hold? The ranks, their tensors and what is known about them, behind one handle."""

from __future__ import annotations

import logging
import secrets
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ray

from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.cluster.gather import assemble, find_parts
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.names import model_of
from ray_streamer.cluster.tracing import collect_trace
from ray_streamer.cluster.worker import LoadWorker, Seating
from ray_streamer.errors import ClusterError, RankFailedError, RayStreamerError
from ray_streamer.planning.limits import share_memory
from ray_streamer.planning.read_plan import hash_plan
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.report.load_report import LoadReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import torch

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.cluster.phases import Phases
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.cluster.worker import Agreed
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.sharding.mesh import Mesh

logger = logging.getLogger(__name__)

_SHUT_DOWN = "this model was shut down; load it again"


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all ranks of a model load by.

    Attributes:
        index: The checkpoint.
        index_ref: It, as bytes in Ray's object store.
        topology: Which ranks share a node.
        memory_limits: Staging bytes of each rank.
        limits: The sizes that shape every node's plan.
        is_planned_here: Whether this process can say what the ranks hold, too.
    """

    index: CheckpointIndex
    index_ref: ray.ObjectRef[bytes]
    topology: Topology
    memory_limits: tuple[int, ...]
    limits: ReadLimits
    is_planned_here: bool


class ShardedModel:
    """A checkpoint loaded over the ranks of a group of actors; use it as a context manager, or call `shutdown`.

    Made by `load_sharded`.
    """

    def __init__(
        self,
        request: LoadRequest,
        placement: PlacementOptions,
        *,
        index: CheckpointIndex | None = None,
        phases: Phases,
        wait: bool,
        on_progress: Callable[[list[RankStatistics | None]], None] | None = None,
        trace: Path | None = None,
    ) -> None:
        self._request = request
        self._placement = placement
        self._index = index
        self._phases = phases
        self._on_progress = on_progress
        self._trace_file = trace
        self._group: WorkerGroup | None = None
        self._is_shut_down = False
        self._shared: _Shared | None = None
        self._plan: ReadPlan | None = None
        self._loaded: Future[LoadReport] = Future()
        if wait:
            # In this thread, so that an interrupt tears the group down.
            self._load()
            self.wait()
        else:
            threading.Thread(target=self._load, name="ray_streamer-load", daemon=True).start()

    def wait(self, timeout_seconds: float | None = None) -> Self:
        """Waits until every rank has its tensors.

        Raises:
            TimeoutError: It takes longer; the load goes on.
            RayStreamerError: The load failed; everything was torn down.
        """
        self._loaded.result(timeout_seconds)
        return self

    @property
    def mesh(self) -> Mesh:
        """The grid of ranks."""
        return self._request.mesh

    @property
    def plan(self) -> ReadPlan:
        """The plan that was executed, as one value; every rank has its own part of it. Made when it is asked for first.

        Raises:
            ClusterError: Only the ranks can make it, and they were shut down.
        """
        self.wait()
        plan = self._plan
        if plan is None:
            assert self._shared is not None
            plan = self._plan = self._make_plan(self._shared)
        return plan

    def _make_plan(self, shared: _Shared) -> ReadPlan:
        sizes = shared.topology, shared.memory_limits
        if shared.is_planned_here:
            return self._request.plan(sizes[0], memory_limits=sizes[1], index=shared.index)
        return self._ready().call("plan", shared.index_ref, *sizes, ranks=[0], keep_on_failure=True)[0]

    @property
    def workers(self) -> tuple[Any, ...]:
        """The actor handle of each rank."""
        return self._ready().actors

    def stats(self) -> LoadReport:
        """What the load did; see `LoadReport`."""
        return self._loaded.result()

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes every block's life on all ranks to a file that ui.perfetto.dev opens; see docs/trace.md.

        Raises:
            OSError: The file cannot be written.
            RankFailedError: A rank died.
        """
        collect_trace(self._ready(), self._request.uri, self._phases).write(Path(path))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `function(context, *args)` on every rank at once, beside its tensors.

        Args:
            function: Picklable; its first argument is a `RankContext`.
            args: Picklable, the same for every rank.

        Returns:
            The result of each rank, in rank order. Return small things: results travel through the object store.

        Raises:
            RankFailedError: The function raised on a rank, or the rank died; tensors of the live ranks stay.
        """
        return self._ready().call("run", function, args, keep_on_failure=True)

    def gather(self, name: str) -> torch.Tensor:
        """One whole tensor, put together on this process from the ranks' results; for looking at, not for serving.

        Args:
            name: Of a result; of the checkpoint's tensor, where tensors are fused into results.

        Raises:
            KeyError: There is no such result or tensor, or no rank holds any of it.
            RankFailedError: A rank died, or a function that ran there took the tensor away.
        """
        tensor, held = find_parts(self.plan, name)
        held.sort(key=lambda holder: holder.result)
        parts: list[bytes] = []
        for result in dict.fromkeys(holder.result for holder in held):
            ranks = [holder.rank for holder in held if holder.result == result]
            parts += self._ready().call("take_bytes", result, ranks=ranks, keep_on_failure=True)
        return assemble(held[0].dtype, self.plan.index.shape_of(tensor), held, parts)

    def restart(self, rank: int) -> RankStatistics:
        """Replaces one rank's actor, dead or alive, and loads its slices again; the other ranks keep theirs.

        Raises:
            ClusterError: The actor cannot be started.
            RankFailedError: The rank's load failed; an object that changed since the first load is such a failure.
        """
        group = self._ready()
        assert self._shared is not None
        group.restart(rank)
        self._agree(group, self._shared, alone=rank)
        return group.call("load", ranks=[rank], keep_on_failure=True)[0]

    def shutdown(self) -> None:
        """Ends the ranks and frees their tensors, also while they load; may be called again. Ray itself stays."""
        self._is_shut_down = True
        if self._group is not None:
            self._group.shutdown()

    def __repr__(self) -> str:
        if self._is_shut_down:
            state = "shut down"
        elif self._loaded.done():
            state = f"loaded in {self.stats().seconds['total']:.1f} s"
        else:
            state = "loading"
        axes = ", ".join(f"{axis}={self.mesh.axis_size(axis)}" for axis in self.mesh.axes)
        return f"ShardedModel({self._request.uri!r}, {axes}, {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _ready(self) -> WorkerGroup:
        self.wait()
        if self._group is None or self._is_shut_down:
            raise ClusterError(_SHUT_DOWN)
        return self._group

    def _load(self) -> None:
        try:
            report = self._load_all()
            self._write_trace_asked_for()
            self._loaded.set_result(report)
        except BaseException as error:
            # After a shutdown the ranks' deaths were ordered; they are no failure of theirs.
            failure = ClusterError(_SHUT_DOWN) if self._is_shut_down else error
            self.shutdown()
            self._loaded.set_exception(failure)

    def _load_all(self) -> LoadReport:
        request = self._request
        group = self._group = WorkerGroup(
            LoadWorker,
            request.mesh.num_ranks,
            args=(request,),
            placement=self._placement,
            holding=model_of(request.uri),
            is_called_off=lambda: self._is_shut_down,
            startup_timeout_seconds=request.settings.startup_timeout_seconds,
        )
        if self._is_shut_down:
            raise ClusterError(_SHUT_DOWN)
        self._phases.end("start")
        self._shared = shared = self._share(group)
        agreed = self._agree(group, shared)
        self._phases.end("plan")
        statistics: list[RankStatistics] = group.call("load", on_progress=self._on_progress)
        self._phases.end("load", of_which={"import": max(rank.seconds["device"] for rank in statistics)})
        return self._report(shared, group, agreed, statistics)

    def _write_trace_asked_for(self) -> None:
        """A trace that cannot be written costs no model."""
        if self._trace_file is not None and self._group is not None:
            try:
                collect_trace(self._group, self._request.uri, self._phases).write(self._trace_file)
            except OSError as error:
                logger.warning("the model is loaded, but its trace was not written: %s", error)

    def _share(self, group: WorkerGroup) -> _Shared:
        """What all ranks load by; the headers are read where the storage is, unless this process has read them."""
        settings, topology = self._request.settings, Topology(group.nodes)
        memory_limits = share_memory(
            topology,
            memory_limit=settings.memory_limit,
            node_memory_limit=settings.node_memory_limit,
            available_bytes=[min(group.facts[rank].available_memory_bytes for rank in ranks) for ranks in group.nodes],
        )
        limits = self._request.read_limits(memory_limits)
        is_planned_here = self._index is not None
        if self._index is None:
            with _faults_of_the_request():
                self._index = index_from_bytes(group.ask("read_index"))
        index_ref = ray.put(index_to_bytes(self._index))
        return _Shared(self._index, index_ref, topology, memory_limits, limits, is_planned_here)

    def _agree(self, group: WorkerGroup, shared: _Shared, *, alone: int | None = None) -> list[Agreed]:
        """Lets the ranks of each node plan; or one rank for itself, whose neighbours have their tensors."""
        secret = secrets.token_hex(16)
        nodes = [(alone,)] if alone is not None else shared.topology.nodes
        seatings = {
            rank: Seating(
                # Several nodes may share a machine, and with it the names of sockets.
                session=f"{secret}/{number}",
                ranks=ranks,
                node=group.facts[rank].node,
                terms=MemoryTerms(shared.memory_limits[rank], shared.limits),
            )
            for number, ranks in enumerate(nodes)
            for rank in ranks
        }
        chosen = sorted(seatings)
        with _faults_of_the_request():
            return group.call(
                "agree",
                shared.index_ref,
                ranks=chosen,
                per_rank_args=[(seatings[rank],) for rank in chosen],
                keep_on_failure=alone is not None,
            )

    def _report(
        self, shared: _Shared, group: WorkerGroup, agreed: list[Agreed], statistics: list[RankStatistics]
    ) -> LoadReport:
        firsts = [agreed[ranks[0]] for ranks in shared.topology.nodes]
        return LoadReport(
            uri=self._request.uri,
            mesh={axis: self.mesh.axis_size(axis) for axis in self.mesh.axes} | {"ep": self.mesh.ep},
            seconds=self._phases.seconds(),
            checkpoint_bytes=shared.index.total_bytes,
            needed_bytes=sum(first.needed_bytes for first in firsts),
            plan_hash=hash_plan(
                shared.topology, [first.node_plan_hash for first in firsts], [rank.slices_hash for rank in agreed]
            ),
            nodes=tuple(facts.node for facts in group.facts),
            ranks=tuple(statistics),
        )


@contextmanager
def _faults_of_the_request() -> Iterator[None]:
    """What is wrong with a checkpoint, or with what is asked of it, is no rank's fault, and raised as it is."""
    try:
        yield
    except RankFailedError as error:
        if isinstance(error.cause, RayStreamerError) and not isinstance(error.cause, ClusterError):
            raise error.cause from error
        raise
