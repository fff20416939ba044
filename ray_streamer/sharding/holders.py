"""Which ranks of a mesh hold any part of a tensor, and over which of them is it cut? Stages for layers, groups for experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct_rows
from ray_streamer.sharding.experts import ExpertMap
from ray_streamer.sharding.model_structure import ModelStructure
from ray_streamer.sharding.pipeline import Pipeline
from ray_streamer.sharding.tensor_slice import runs_of
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.experts import Experts, ExpertsLike
    from ray_streamer.sharding.mesh import Mesh, MeshPosition
    from ray_streamer.sharding.model_structure import Locations
    from ray_streamer.sharding.name_kinds import NameKinds
    from ray_streamer.sharding.pipeline import StageSet
    from ray_streamer.sharding.placement import Placement
    from ray_streamer.sharding.tensor_slice import TensorSlice


@dataclass(frozen=True, slots=True)
class Holders:
    """Where one kind of tensor may lie.

    Attributes:
        stages: Stages that hold it; None for all.
        groups: Groups that hold it, when it is one expert's own; else None.
        experts: The experts of each group, when its first dimension counts experts; else None.
    """

    stages: StageSet | None = None
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
            return f"its first dimension should count {counted(num_experts, 'expert')}"
        for index in range(mesh.expert_tp):
            part = placement.share_of(shape, tp_index=index, tp=mesh.expert_tp)
            if part is not None and part.indices[0] != (range(shape[0]),):
                return "its first dimension counts experts, which ep divides; its rule divides them again"
        return None

    def holds(self, at: MeshPosition) -> bool:
        """Whether ranks at this position hold any of it."""
        if self.stages is not None and at.pp not in self.stages:
            return False
        return self.groups is None or at.expert_group in self.groups

    def slice_of(self, share: TensorSlice, at: MeshPosition) -> TensorSlice:
        """What ranks at this position hold, given the share of their tp index; `holds` says that they do."""
        if self.experts is None:
            return share
        rows = self.experts[at.expert_group]
        return share.with_indices(0, runs_of(rows))


ALL_RANKS = Holders()


def find_holders(
    index: CheckpointIndex,
    names: NameKinds,
    mesh: Mesh,
    *,
    stage_layers: Sequence[int] | None = None,
    experts: ExpertsLike | None = None,
) -> tuple[list[Holders], NDArray[np.int64]]:
    """The distinct holders, and for each tensor of the checkpoint the position of its own.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        mesh: The grid of ranks.
        stage_layers: Layers of each stage; `divide_layers` says when unset.
        experts: Experts of each group, for all layers or by layer; `divide_experts` says when unset.

    Raises:
        ShardingError: The config's family is not known, layers or experts do not divide so, or the checkpoint lacks some.
    """
    if mesh.pp == mesh.ep == 1 and stage_layers is None:
        return [ALL_RANKS], np.zeros(len(index), dtype=np.int64)
    try:
        structure = ModelStructure.of(index.config or {})
    except ShardingError as error:
        raise ShardingError(
            f"{index.uri}: pp={mesh.pp} and ep={mesh.ep} need to know which tensor is in which layer and expert: {error}"
        ) from error
    located = structure.locate(names)
    nowhere = np.full(len(index), -1, dtype=np.int64)
    sets, stages = [], nowhere
    if mesh.pp > 1 or stage_layers is not None:
        sets, stages = Pipeline.of(index, structure, located, mesh.pp, stage_layers).stages_of(located)
    groups, group_ids, stacked, stacked_ids = [], nowhere, [], nowhere
    if mesh.ep > 1:
        expert_map = ExpertMap.of(structure, mesh.ep, experts)
        stacked, map_ids = expert_map.maps(), expert_map.map_ids(located.layers)
        stacked_ids = np.where(located.is_stacked_experts & (located.experts < 0), map_ids, -1)
        _check_experts(index, structure, located)
        groups, group_ids = _groups_of_experts(expert_map, map_ids, located.experts)
    rows = distinct_rows([stages, group_ids, stacked_ids])
    holders = [
        Holders(
            stages=sets[stage] if stage >= 0 else None,
            groups=groups[group] if group >= 0 else None,
            experts=stacked[number] if number >= 0 else None,
        )
        for stage, group, number in rows.values()
    ]
    return holders, rows.ids


def _check_experts(index: CheckpointIndex, structure: ModelStructure, located: Locations) -> None:
    beyond = np.flatnonzero(located.experts >= structure.num_experts)
    if len(beyond):
        name, expert = index.names[beyond[0]], located.experts[beyond[0]]
        raise ShardingError(
            f"{name} is of expert {expert}; config.json names {counted(structure.num_experts, 'expert')}"
        )


def _groups_of_experts(
    expert_map: ExpertMap, map_ids: NDArray[np.int64], experts: NDArray[np.int64]
) -> tuple[list[tuple[int, ...]], NDArray[np.int64]]:
    """Sets of groups, and for each tensor the position of the set that holds its expert; -1 where it is no expert's own."""
    ids: dict[tuple[int, ...], int] = {}
    by_map = [[ids.setdefault(groups, len(ids)) for groups in holders] for holders in expert_map.holders()]
    found = np.array(by_map, dtype=np.int64)[map_ids, np.maximum(experts, 0)]
    return list(ids), np.where(experts < 0, -1, found)
