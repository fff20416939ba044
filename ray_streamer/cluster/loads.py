"""How does a group of workers load together, once and again? One index for all; then the ranks of each node agree and load.

    read_index     the first rank, unless the driver has read the headers
    agree          all ranks: those of a node meet, unless they are met already, and plan
    load           all ranks

Ranks of a node stay met between loads. A load that failed, or a rank that was replaced, ends that: for the next load they meet anew.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import ray

from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.errors import AccessError, ClusterError, ObjectMissingError, RankFailedError, RayStreamerError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.planning.limits import share_memory
from ray_streamer.planning.read_plan import hash_plan, plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.report.evidence import Evidence, slowest_node
from ray_streamer.report.findings import Findings
from ray_streamer.report.load_report import LoadReport
from ray_streamer.report.verdict.model import RequestedSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.cluster.group import WorkerGroup
    from ray_streamer.cluster.phases import Phases
    from ray_streamer.cluster.worker import PlanDigest
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.rank.trace import RankTrace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTerms:
    """What all ranks of one load load by.

    Attributes:
        request: What is loaded.
        index: The checkpoint.
        index_ref: It, as bytes in Ray's object store.
        topology: Which ranks share a node.
        memory_limits: Staging bytes of each rank.
        limits: The sizes that shape every node's plan.
        is_planned_here: Whether this process can say what the ranks hold, too.
    """

    request: LoadRequest
    index: CheckpointIndex
    index_ref: ray.ObjectRef[bytes]
    topology: Topology
    memory_limits: tuple[int, ...]
    limits: ReadLimits
    is_planned_here: bool

    @property
    def plan_here(self) -> Callable[[], ReadPlan] | None:
        """Makes the plan of all ranks in this process; None where only they know what they hold."""
        if not self.is_planned_here:
            return None
        return partial(self.request.plan, self.topology, memory_limits=self.memory_limits, index=self.index)


class GroupLoads:
    """The loads of one group of `LoadWorker`s, one at a time.

    Args:
        group: Its workers.
        on_progress: Called while ranks load, with every rank's statistics.
    """

    def __init__(
        self, group: WorkerGroup, on_progress: Callable[[list[RankStatistics | None]], None] | None = None
    ) -> None:
        self._group = group
        self._on_progress = on_progress
        self._secret = secrets.token_hex(16)

    def terms_of(self, request: LoadRequest, index: CheckpointIndex | None = None) -> LoadTerms:
        """Gathers what all ranks need, the headers where the storage is.

        Args:
            request: What to load.
            index: The headers, where this process has read them and can say what the ranks hold.

        Raises:
            RayStreamerError: The checkpoint cannot be read, or the memory limit cannot work.
        """
        group, settings, topology = self._group, request.settings, Topology(self._group.nodes)
        memory_limits = share_memory(
            topology,
            memory_limit=settings.memory_limit,
            node_memory_limit=settings.node_memory_limit,
            available_bytes=[min(group.facts[rank].available_memory_bytes for rank in ranks) for ranks in group.nodes],
        )
        limits = request.read_limits(memory_limits)
        is_planned_here = index is not None
        if index is None:
            with _faults_of_the_request():
                index = index_from_bytes(group.ask("read_index", request))
        return LoadTerms(
            request=request,
            index=index,
            index_ref=ray.put(index_to_bytes(index)),
            topology=topology,
            memory_limits=memory_limits,
            limits=limits,
            is_planned_here=is_planned_here,
        )

    def load(
        self, terms: LoadTerms, phases: Phases, *, again: bool = False, on_begin: Callable[[], object] = bool
    ) -> LoadReport:
        """Lets all ranks load.

        Args:
            terms: What they load by.
            phases: The clock of the report.
            again: Whether ranks hold tensors already, and a failure leaves the group alive.
            on_begin: Called before ranks let go of what they hold.

        Raises:
            RayStreamerError: The checkpoint cannot be planned so.
            RankFailedError: A rank failed.
        """
        if again:
            self._group.call("forget_abort", keep_on_failure=True)
        try:
            phases.begin("plan")
            agreed = self._agree(terms, terms.topology.nodes, self._secret, keep_on_failure=again)
            phases.end("plan")
            phases.begin("load")
            on_begin()
            statistics: list[RankStatistics] = self._group.call(
                "load",
                per_rank_args=[(digest.agreement,) for digest in agreed],
                on_progress=self._on_progress,
                keep_on_failure=again,
            )
        except BaseException as error:
            self.part()
            _note_whose_access(terms, error)
            raise
        phases.end("load", of_which={"import": max(rank.seconds["device"] for rank in statistics)})
        return _report(terms, self._group, phases, agreed, statistics)

    def load_alone(self, terms: LoadTerms, rank: int) -> RankStatistics:
        """Lets one rank load for itself: its neighbours have their tensors."""
        self.part()
        (digest,) = self._agree(terms, [(rank,)], secrets.token_hex(16), keep_on_failure=True)
        return self._group.call("load", digest.agreement, ranks=[rank], keep_on_failure=True)[0]

    def part(self) -> None:
        """Lets ranks meet anew for the next load, under another name."""
        self._secret = secrets.token_hex(16)

    def plan(self, terms: LoadTerms) -> ReadPlan:
        """The plan of all ranks; what they hold is known here, or they say it."""
        plan_here = terms.plan_here
        if plan_here is not None:
            return plan_here()
        return plan_reads(terms.index, self._group.call("slices", keep_on_failure=True), terms.topology, terms.limits)

    def _agree(
        self, terms: LoadTerms, nodes: Sequence[tuple[int, ...]], secret: str, *, keep_on_failure: bool
    ) -> list[PlanDigest]:
        """Lets ranks agree with those that read for them: `nodes` are their numbers, of whole nodes or of one rank alone."""
        timeouts = Timeouts.of(terms.request.settings)
        places = {
            rank: Place(
                # Several nodes may share a machine, and with it the names of sockets.
                session=f"{secret}/{number}",
                rank=rank,
                ranks=ranks,
                node=self._group.facts[rank].node,
                timeouts=timeouts,
            )
            for number, ranks in enumerate(nodes)
            for rank in ranks
        }
        chosen = sorted(places)
        with _faults_of_the_request():
            return self._group.call(
                "agree",
                terms.request,
                terms.index_ref,
                ranks=chosen,
                per_rank_args=[(places[rank], MemoryTerms(terms.memory_limits[rank], terms.limits)) for rank in chosen],
                keep_on_failure=keep_on_failure,
            )


def _report(
    terms: LoadTerms, group: WorkerGroup, phases: Phases, agreed: list[PlanDigest], statistics: list[RankStatistics]
) -> LoadReport:
    mesh = terms.request.mesh
    firsts = [agreed[ranks[0]] for ranks in terms.topology.nodes]
    return LoadReport(
        uri=terms.request.uri,
        mesh={axis: mesh.axis_size(axis) for axis in mesh.axes} | {"ep": mesh.ep},
        seconds=phases.seconds(),
        checkpoint_bytes=terms.index.total_bytes,
        needed_bytes=sum(first.needed_bytes for first in firsts),
        plan_hash=hash_plan(
            terms.topology, [first.node_plan_hash for first in firsts], [rank.slices_hash for rank in agreed]
        ),
        nodes=tuple(facts.node for facts in group.facts),
        ranks=tuple(statistics),
        evidence=_evidence(terms, group, statistics),
    )


def _evidence(terms: LoadTerms, group: WorkerGroup, statistics: list[RankStatistics]) -> Evidence | Findings:
    """The traces of the slowest node; a rank that cannot tell any more costs the verdict and not the load."""
    node = slowest_node(terms.topology.nodes, statistics)
    try:
        traces: list[RankTrace] = group.call("trace", ranks=list(node), keep_on_failure=True)
    except RankFailedError as error:
        logger.warning("the model is loaded, but there is no verdict on its load: %s", error)
        return Findings(untold=(f"No word on what bounded the load: {error}.",))
    return Evidence(traces, RequestedSettings.of(terms.request.settings), plan=terms.plan_here)


def _note_whose_access(terms: LoadTerms, error: BaseException) -> None:
    """Says so where this process could read what a rank is refused, as with keys that were set here after Ray had started."""
    cause = error.cause if isinstance(error, RankFailedError) else error
    if terms.is_planned_here and terms.request.is_remote and isinstance(cause, AccessError | ObjectMissingError):
        error.add_note(
            "This process could read the checkpoint. Ranks have the variables and credentials with which Ray was started on their nodes: "
            "give them these by settings or by runtime_env (docs/s3.md#credentials)"
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
