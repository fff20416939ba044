"""What does the caller hold? The ranks, their tensors and what is known about them, behind one handle."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

import ray

from ray_streamer.cluster.gather import assemble, find_parts
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.names import model_of
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.errors import ClusterError, RankFailedError, RayStreamerError
from ray_streamer.planning.limits import share_memory
from ray_streamer.planning.topology import Topology
from ray_streamer.report.load_report import LoadReport

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.cluster.phases import Phases
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.sharding.mesh import Mesh

_SHUT_DOWN = "this model was shut down; load it again"


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
    ) -> None:
        self._request = request
        self._placement = placement
        self._index = index
        self._phases = phases
        self._on_progress = on_progress
        self._group: WorkerGroup | None = None
        self._is_shut_down = False
        self._plan: ReadPlan | None = None
        self._plan_ref: Any = None
        self._memory_limits: tuple[int, ...] = ()
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
        """The plan that was executed."""
        self.wait()
        assert self._plan is not None
        return self._plan

    @property
    def workers(self) -> tuple[Any, ...]:
        """The actor handle of each rank."""
        return self._ready().actors

    def stats(self) -> LoadReport:
        """What the load did; see `LoadReport`."""
        return self._loaded.result()

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
        group.restart(rank)
        args = (secrets.token_hex(16), group.facts[rank].node, self._memory_limits[rank])
        return group.call("load_alone", self._plan_ref, *args, ranks=[rank], keep_on_failure=True)[0]

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
            self._loaded.set_result(self._load_all())
        except BaseException as error:
            # After a shutdown the ranks' deaths were ordered; they are no failure of theirs.
            failure = ClusterError(_SHUT_DOWN) if self._is_shut_down else error
            self.shutdown()
            self._loaded.set_exception(failure)

    def _load_all(self) -> LoadReport:
        request = self._request
        group = WorkerGroup(
            LoadWorker,
            request.mesh.num_ranks,
            args=(request,),
            placement=self._placement,
            holding=model_of(request.uri),
            meanwhile=self._plan_meanwhile,
            is_called_off=lambda: self._is_shut_down,
            startup_timeout_seconds=request.settings.startup_timeout_seconds,
        )
        self._phases.end("import")
        plan = self._plan
        assert plan is not None
        session = secrets.token_hex(16)
        statistics = group.call(
            "load",
            self._plan_ref,
            session,
            per_rank_args=list(zip([facts.node for facts in group.facts], self._memory_limits, strict=True)),
            on_progress=self._on_progress,
        )
        self._phases.end("load")
        return self._report(plan, group, statistics)

    def _plan_meanwhile(self, group: WorkerGroup) -> None:
        """Plan while the ranks import torch: here, where the headers are known, else on the first rank."""
        self._group = group
        if self._is_shut_down:
            raise ClusterError(_SHUT_DOWN)
        self._phases.end("start")
        settings = self._request.settings
        topology = Topology(group.nodes)
        self._memory_limits = share_memory(
            topology,
            memory_limit=settings.memory_limit,
            node_memory_limit=settings.node_memory_limit,
            available_bytes=[min(group.facts[rank].available_memory_bytes for rank in ranks) for ranks in group.nodes],
        )
        if self._index is None:
            self._plan = _plan_on_rank(group, self._request, topology, self._memory_limits)
        else:
            self._plan = self._request.plan(topology, memory_limits=self._memory_limits, index=self._index)
        self._plan_ref = ray.put(self._plan)
        self._phases.end("plan")

    def _report(self, plan: ReadPlan, group: WorkerGroup, statistics: list[RankStatistics]) -> LoadReport:
        return LoadReport(
            uri=self._request.uri,
            mesh={axis: self.mesh.axis_size(axis) for axis in self.mesh.axes} | {"ep": self.mesh.ep},
            seconds=self._phases.seconds(),
            checkpoint_bytes=plan.index.total_bytes,
            needed_bytes=sum(plan.node_plans[number].needed_bytes for number in plan.node_plan_ids),
            plan_hash=plan.plan_hash,
            nodes=tuple(facts.node for facts in group.facts),
            ranks=tuple(statistics),
        )


def _plan_on_rank(
    group: WorkerGroup, request: LoadRequest, topology: Topology, memory_limits: tuple[int, ...]
) -> ReadPlan:
    """The plan, made where the storage is; what is wrong with it is the request's fault, not the rank's."""
    try:
        return group.ahead(read_headers_and_plan, request, topology, memory_limits)
    except RankFailedError as error:
        if isinstance(error.cause, RayStreamerError):
            raise error.cause from error
        raise


def read_headers_and_plan(request: LoadRequest, topology: Topology, memory_limits: tuple[int, ...]) -> ReadPlan:
    """The plan, from the headers on; runs on a rank."""
    return request.plan(topology, memory_limits=memory_limits)
