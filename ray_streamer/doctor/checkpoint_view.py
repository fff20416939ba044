"""What does this node see of a load's checkpoint? Its headers read once, and planned once, for all checks and for the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.doctor.finding import failed
from ray_streamer.doctor.storage_checks import check_checkpoint
from ray_streamer.errors import BudgetError, RayStreamerError
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, rank_memory_limit
from ray_streamer.planning.pieces import RowCopies
from ray_streamer.planning.topology import Topology

if TYPE_CHECKING:
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.doctor.finding import Finding
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings
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
        useful_bytes: Staging bytes that all ranks together can use by that plan; None where there is none.
    """

    findings: tuple[Finding, ...]
    index: CheckpointIndex | None = None
    rank_bytes: tuple[int, ...] = ()
    plan: ReadPlan | None = None
    memory_limit: int = 0
    useful_bytes: int | None = None

    @classmethod
    def of(cls, request: LoadRequest, storage: Storage, settings: Settings) -> CheckpointView:
        """Reads the headers and plans; what goes wrong is a finding. `check_memory` has the one about a limit that holds no block.

        Args:
            request: A load whose ranks are all on this node.
            storage: Open on the checkpoint.
            settings: Of the load; see `examine`.
        """
        index, findings = check_checkpoint(request, storage)
        if index is None:
            return cls(findings=tuple(findings))
        rank_bytes: tuple[int, ...] = ()
        try:
            rank_bytes = _rank_bytes(request, index)
            plan, limit = _plan(request, index, settings)
        except BudgetError:
            return cls(findings=tuple(findings), index=index, rank_bytes=rank_bytes)
        except RayStreamerError as error:
            return cls(findings=(*findings, failed("plan", error)), index=index, rank_bytes=rank_bytes)
        useful_bytes = plan.limits.block_bytes * len(plan.node_plans[0].blocks)
        return cls(
            findings=tuple(findings),
            index=index,
            rank_bytes=rank_bytes,
            plan=plan,
            memory_limit=max(plan.limits.block_bytes, useful_bytes if limit == AS_MUCH_AS_USEFUL else limit),
            useful_bytes=useful_bytes,
        )


def _rank_bytes(request: LoadRequest, index: CheckpointIndex) -> tuple[int, ...]:
    """Known without a plan, and so where this node lacks the memory for one."""
    slices = [request.slices(index, rank) for rank in range(request.mesh.num_ranks)]
    return tuple(int(RowCopies.of(index, said).num_bytes.sum()) for said in slices)


def _plan(request: LoadRequest, index: CheckpointIndex, settings: Settings) -> tuple[ReadPlan, int]:
    """The plan, and each rank's memory limit."""
    num_ranks = request.mesh.num_ranks
    limit = rank_memory_limit(
        memory_limit=settings.memory_limit,
        node_memory_limit=settings.node_memory_limit,
        available_bytes=measure_available_memory(),
        num_local_ranks=num_ranks,
    )
    return request.plan(Topology.even(num_ranks), memory_limits=(limit,) * num_ranks, index=index), limit
