"""What does this node see of a load's checkpoint? Its headers read once, and planned once, for all checks and for the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.doctor.finding import failed
from ray_streamer.doctor.storage_checks import check_checkpoint
from ray_streamer.errors import RayStreamerError
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.limits import rank_memory_limit
from ray_streamer.planning.pieces import RowCopies
from ray_streamer.planning.topology import Topology

if TYPE_CHECKING:
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.doctor.finding import Finding
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """A checkpoint as a load on this node alone would see it.

    Attributes:
        findings: Whether it can be read and planned, and if not, why.
        index: Its tensors; None where they cannot be read.
        rank_bytes: Tensors of each rank, in bytes; empty where that is not known.
        plan: Of all ranks on this node; None where there is none.
        memory_limit: Staging bytes of each rank by that plan.
    """

    findings: tuple[Finding, ...]
    index: CheckpointIndex | None = None
    rank_bytes: tuple[int, ...] = ()
    plan: ReadPlan | None = None
    memory_limit: int = 0

    @classmethod
    def of(cls, request: LoadRequest, storage: Storage) -> CheckpointView:
        """Reads the headers and plans; what goes wrong is a finding.

        Args:
            request: A load whose ranks are all on this node.
            storage: Open on the checkpoint.
        """
        index, findings = check_checkpoint(request, storage)
        if index is None:
            return cls(findings=tuple(findings))
        rank_bytes: tuple[int, ...] = ()
        try:
            rank_bytes = _rank_bytes(request, index)
            plan, memory_limit = _plan(request, index)
        except RayStreamerError as error:
            return cls(findings=(*findings, failed("plan", error)), index=index, rank_bytes=rank_bytes)
        return cls(findings=tuple(findings), index=index, rank_bytes=rank_bytes, plan=plan, memory_limit=memory_limit)


def _rank_bytes(request: LoadRequest, index: CheckpointIndex) -> tuple[int, ...]:
    """Known without a plan, and so where this node lacks the memory for one."""
    slices = [request.slices(index, rank) for rank in range(request.mesh.num_ranks)]
    return tuple(int(RowCopies.of(index, said).num_bytes.sum()) for said in slices)


def _plan(request: LoadRequest, index: CheckpointIndex) -> tuple[ReadPlan, int]:
    """The plan, and each rank's staging bytes: what its blocks can use, where the memory has no limit."""
    num_ranks = request.mesh.num_ranks
    limit = rank_memory_limit(
        memory_limit=request.settings.memory_limit,
        node_memory_limit=request.settings.node_memory_limit,
        available_bytes=measure_available_memory(),
        num_local_ranks=num_ranks,
    )
    plan = request.plan(Topology.even(num_ranks), memory_limits=(limit,) * num_ranks, index=index)
    largest = plan.limits.block_bytes * max(1, len(plan.node_plans[0].blocks))
    return plan, largest if limit < 0 else max(limit, plan.limits.block_bytes)
