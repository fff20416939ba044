"""Which ranks of a mesh hold any part of a tensor, and over which of them is it cut? Stages for layers, groups for experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.anatomy import Anatomy
from ray_streamer.sharding.experts import ExpertMap
from ray_streamer.sharding.pipeline import Pipeline
from ray_streamer.sharding.quantization import weight_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.experts import Experts, ExpertsLike
    from ray_streamer.sharding.mesh import Mesh
    from ray_streamer.sharding.pipeline import Stages
    from ray_streamer.sharding.placement import Placement
    from ray_streamer.sharding.slices import SlicePattern, TensorSlice


@dataclass(frozen=True, slots=True)
class Residence:
    """Where one kind of tensor may lie.

    Attributes:
        stages: Stages that hold it; None for all.
        groups: Groups that hold it, when it is one expert's own; else None.
        experts: The experts of each group, when its first dimension counts experts; else None.
    """

    stages: Stages | None = None
    groups: tuple[int, ...] | None = None
    experts: tuple[Experts, ...] | None = None

    def tp(self, mesh: Mesh) -> int:
        """Ranks over which the tensor is cut."""
        return mesh.tp if self.groups is None and self.experts is None else mesh.expert_tp

    def refusal(self, placement: Placement, shape: tuple[int, ...], mesh: Mesh) -> str | None:
        """Why a tensor with this placement cannot lie so; `placement` itself lets the shape pass."""
        if self.experts is None:
            return None
        num_experts = len({expert for group in self.experts for expert in group})
        if not shape or shape[0] != num_experts:
            return f"its first dimension should count {num_experts} experts"
        for index in range(mesh.expert_tp):
            part = placement.slice_of(shape, tp_index=index, tp=mesh.expert_tp)
            if part is not None and any((box.starts[0], box.stops[0]) != (0, shape[0]) for box in part.boxes):
                return "its first dimension counts experts, which ep divides; its rule divides them again"
        return None

    def pattern(self, shares: Sequence[TensorSlice | None], mesh: Mesh) -> SlicePattern:
        """What each rank of the mesh holds, given the share of each tp index among `tp` of them."""
        return tuple(self._slice_of(rank, shares, mesh) for rank in range(mesh.num_ranks))

    def _slice_of(self, rank: int, shares: Sequence[TensorSlice | None], mesh: Mesh) -> TensorSlice | None:
        at = mesh.coordinate(rank)
        if self.stages is not None and at["pp"] not in self.stages:
            return None
        share = shares[at["tp"] % len(shares)]
        if self.groups is not None:
            return share if mesh.expert_group(rank) in self.groups else None
        if self.experts is not None and share is not None:
            return share.rows(self.experts[mesh.expert_group(rank)])
        return share


EVERYWHERE = Residence()


def find_residences(
    index: CheckpointIndex,
    mesh: Mesh,
    *,
    stage_layers: Sequence[int] | None = None,
    experts: ExpertsLike | None = None,
) -> list[Residence]:
    """Where each tensor of the checkpoint may lie; equal residences are one object.

    Raises:
        ShardingError: The config's family is not known, layers or experts do not divide so, or the checkpoint lacks some.
    """
    if mesh.pp == mesh.ep == 1:
        return [EVERYWHERE] * len(index)
    try:
        anatomy = Anatomy.of(index.config or {})
    except ShardingError as error:
        raise ShardingError(
            f"{index.uri}: pp={mesh.pp} and ep={mesh.ep} need to know which tensor is in which layer and expert: {error}"
        ) from error
    pipeline = Pipeline.of(index, anatomy, mesh.pp, stage_layers) if mesh.pp > 1 else None
    expert_map = ExpertMap.of(anatomy, mesh.ep, experts) if mesh.ep > 1 else None
    known: dict[Residence, Residence] = {}
    residences = [_residence_of(name, anatomy, pipeline, expert_map) for name in index.names]
    return [known.setdefault(residence, residence) for residence in residences]


def _residence_of(name: str, anatomy: Anatomy, pipeline: Pipeline | None, expert_map: ExpertMap | None) -> Residence:
    stages = None if pipeline is None else pipeline.stages_of(name)
    if expert_map is None:
        return Residence(stages)
    layer, expert = anatomy.layer_of(name), anatomy.expert_of(name)
    if expert is not None:
        if expert >= anatomy.num_experts:
            raise ShardingError(f"{name} is of expert {expert}; config.json names {anatomy.num_experts} experts")
        return Residence(stages, groups=expert_map.groups_of(expert, layer))
    is_stacked = anatomy.is_stacked_experts(name) or anatomy.is_stacked_experts(weight_of(name) or "")
    return Residence(stages, experts=expert_map.groups_in(layer) if is_stacked else None)
