"""What does the caller hold? The ranks, their tensors and what is known about them, behind one handle."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from ray_streamer.cluster.gather import assemble, find_parts
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.loads import GroupLoads
from ray_streamer.cluster.names import model_of
from ray_streamer.cluster.phases import Phases
from ray_streamer.cluster.tracing import collect_trace
from ray_streamer.cluster.turns import Turns
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.errors import ClusterError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.named_checkpoint import NamedCheckpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import torch

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.cluster.loads import LoadTerms
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.sharding.mesh import Mesh
    from ray_streamer.storage import UrisLike

logger = logging.getLogger(__name__)

_SHUT_DOWN = "this model was shut down; load it again"


class ShardedModel:
    """A checkpoint loaded over the ranks of a group of actors; use it as a context manager, or call `shutdown`.

    Made by `load_sharded`. Once it is shut down, whatever needs its ranks is a `ClusterError`.

    Attributes:
        worker_class: What stands on each rank.
    """

    worker_class: ClassVar[type[LoadWorker]] = LoadWorker

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
        self._loads: GroupLoads | None = None
        self._terms: LoadTerms | None = None
        self._report: LoadReport | None = None
        self._plan: ReadPlan | None = None
        self._loaded: Future[LoadReport] = Future()
        self._changes = Turns()
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

    def when_loaded(self, tell: Callable[[], object]) -> None:
        """Calls `tell` when the first load is over, however it ended; at once, when it is."""
        self._loaded.add_done_callback(lambda _: tell())

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
            assert self._loads is not None
            assert self._terms is not None
            if not self._terms.is_planned_here:
                self._ready()
            plan = self._plan = self._loads.plan(self._terms)
        return plan

    @property
    def workers(self) -> tuple[Any, ...]:
        """The actor handle of each rank."""
        return self._ready().actors

    def stats(self) -> LoadReport:
        """What the load did, the latest of them; see `LoadReport`."""
        first = self._loaded.result()
        return self._report or first

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes every block's life on all ranks to a file that ui.perfetto.dev opens; see docs/trace.md.

        Raises:
            SettingsError: The file cannot be written.
            RankFailedError: A rank died.
        """
        collect_trace(self._ready(), self._request.uri, self._phases).write(Path(path))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `function(context, *args)` on every rank at once, beside its tensors.

        Functions of several threads run one after the other, in the same order on every rank, so they may use collectives.

        Args:
            function: Picklable; its first argument is a `RankContext`.
            args: Picklable, the same for every rank.

        Returns:
            The result of each rank, in rank order. Return small things: results travel through the object store.

        Raises:
            RankFailedError: The function raised on a rank, or the rank died or was stopped by a signal; tensors of the live ranks
                stay.
        """
        return self._ready().call("run", function, args, keep_on_failure=True, is_callers=True)

    def gather(self, name: str) -> torch.Tensor:
        """One whole tensor, put together on this process from the ranks' results; for looking at, not for serving.

        Args:
            name: Of a result; of the checkpoint's tensor, where tensors are fused into results.

        Raises:
            SettingsError: There is no such result or tensor, or no rank holds any of it.
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

        Waits until a `reload` or `restart` of another thread has ended.

        Raises:
            SettingsError: There is no such rank.
            ClusterError: The actor cannot be started.
            RankFailedError: The rank's load failed; an object that changed since the first load is such a failure.
        """
        rank = self._ready().checked_rank(rank)
        with self._changing(f"restart({rank})") as (group, loads):
            assert self._terms is not None
            group.restart(rank)
            return loads.load_alone(self._terms, rank)

    def reload(self, uri: UrisLike | None = None) -> LoadReport:
        """Loads again into the same ranks: new weights under the same uri, or those of another one.

        A tensor of the same name, shape and dtype keeps its memory, and so its address; others are made anew, and those that the
        checkpoint does not give any more are dropped. Nobody may use the tensors meanwhile. The bound of memory stays. After a
        failure ranks hold no tensors; the model may be reloaded again. Waits until a `reload` or `restart` of another thread has ended.

        Args:
            uri: Another checkpoint, for the same mesh and rules; the one that is loaded when unset.

        Returns:
            What this load did; `stats` gives it from now on.

        Raises:
            RayStreamerError: The checkpoint cannot be read, or not be cut so; then ranks still hold what they held.
            RankFailedError: A rank failed.
        """
        with self._changing("reload") as (_, loads):
            phases = Phases()
            request = self._request
            if uri is not None:
                named = NamedCheckpoint.of(uri, request.settings)
                request = replace(request, uri=named.uri, settings=named.settings)
            terms = loads.terms_of(request)
            phases.end("headers")

            def begin() -> None:
                # However this ends, ranks hold nothing of the old checkpoint from here on.
                self._request, self._terms, self._plan = request, terms, None

            report = loads.load(terms, phases, again=True, on_begin=begin)
            self._phases, self._report = phases, report
            return report

    def shutdown(self) -> None:
        """Ends the ranks and frees their tensors, also while they load; may be called again. Ray itself stays."""
        self._is_shut_down = True
        if self._group is not None:
            self._group.shutdown()

    def connect_ranks(self, group: WorkerGroup) -> None:
        """What new ranks need of each other before they load; tensors alone need nothing."""

    def __repr__(self) -> str:
        if self._is_shut_down:
            state = "shut down"
        elif self._loaded.done():
            state = f"loaded in {self.stats().seconds['total']:.1f} s"
        else:
            state = "loading"
        axes = ", ".join(f"{axis}={self.mesh.axis_size(axis)}" for axis in self.mesh.axes)
        return f"ShardedModel({self._request.uri!r}, {axes}, {state})"

    def __reduce__(self) -> NoReturn:
        """What Ray asks for when a task or an actor is given this; else its error would be about locks."""
        raise ClusterError(
            f"{self} belongs to the process that loaded it, and cannot be sent to another one: hand on what run() and gather() "
            "return, or call load_sharded in the actor that uses the model"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _ready(self) -> WorkerGroup:
        self.wait()
        if self._group is None or self._is_shut_down:
            raise ClusterError(_SHUT_DOWN)
        return self._group

    @contextmanager
    def _changing(self, doing: str) -> Iterator[tuple[WorkerGroup, GroupLoads]]:
        """The ranks and their loads, for one call that changes what ranks hold; other such calls wait for it."""
        self._ready()
        with self._changes.turn(doing, look=self._ready):
            group = self._ready()
            assert self._loads is not None
            yield group, self._loads

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
        self._phases.begin("start")
        group = self._group = WorkerGroup(
            self.worker_class,
            request.mesh.num_ranks,
            args=(request,),
            placement=self._placement,
            holding=model_of(request.uri),
            is_called_off=lambda: self._is_shut_down,
            timeouts=Timeouts.of(request.settings),
        )
        if self._is_shut_down:
            raise ClusterError(_SHUT_DOWN)
        self.connect_ranks(group)
        self._phases.end("start")
        self._loads = GroupLoads(group, self._on_progress)
        self._terms = self._loads.terms_of(request, self._index)
        return self._loads.load(self._terms, self._phases)

    def _write_trace_asked_for(self) -> None:
        """A trace that cannot be written costs no model."""
        if self._trace_file is not None and self._group is not None:
            try:
                collect_trace(self._group, self._request.uri, self._phases).write(self._trace_file)
            except Exception as error:
                logger.warning("the model is loaded, but its trace was not written: %s", error)
