"""Can a checkpoint be placed on a mesh by these rules? All tensors in groups, or one error that says it all.

Tensors alike in rule, shape and dtype are resolved once: a model of 92,000 tensors has a few dozen such groups. All
tensors that cannot be split so are found before anything is raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.groups import DEFAULT_UNMATCHED, TensorGroup, TensorGroups, Unmatched, group_tensors, named
from ray_streamer.sharding.head_counts import refuse_other_heads
from ray_streamer.sharding.holders import ALL_RANKS, find_holders
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.name_kinds import NameKinds, kinds_of_tensors
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.rules import ShardRules

LARGEST_TP = 128
"""How far `legal_tp` tries."""

_NUM_SHOWN = 8


def checked_groups(
    index: CheckpointIndex,
    names: NameKinds,
    rules: ShardRules,
    mesh: Mesh,
    *,
    unmatched: Unmatched = DEFAULT_UNMATCHED,
    stage_layers: Sequence[int] | None = None,
    experts: ExpertsLike | None = None,
) -> TensorGroups:
    """All tensors in groups, each of which can be placed on `mesh`.

    Tensors of fewer than two dimensions without a rule are replicated, unless they lie beside a weight that is cut.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        rules: Which placement each name has.
        mesh: How many ranks, and where each one is.
        unmatched: What becomes of tensors of two or more dimensions without a rule.
        stage_layers: Layers of each stage; `divide_layers` says when unset.
        experts: Experts of each group, for all layers or by layer; `divide_experts` says when unset.

    Raises:
        ShardingError: A rule that is not optional places no tensor; a tensor has no rule; layers or experts cannot be divided
            over the mesh; or tensors cannot be split over `mesh.tp` ranks, and the message lists the sizes over which the
            whole checkpoint can.
        CheckpointError: The numbers of attention heads do not fit the tensors.
        SettingsError: `unmatched` is neither of its two values.
    """
    holders, holder_ids = find_holders(index, names, mesh, stage_layers=stage_layers, experts=experts)
    grouped = group_tensors(index, names, rules, holders, holder_ids, unmatched)
    refusals = [(group, refusal) for group in grouped.groups if (refusal := group.refusal(mesh))]
    if refusals:
        raise ShardingError(_cannot_split(index, mesh, refusals, _legal_among(grouped.groups, mesh)))
    if mesh.tp > 1:
        refuse_other_heads(index, grouped, mesh.tp)
    return grouped


def legal_tp(index: CheckpointIndex, rules: ShardRules, *, unmatched: Unmatched = DEFAULT_UNMATCHED) -> tuple[int, ...]:
    """The tp sizes, up to `LARGEST_TP`, over which every tensor can be split.

    Raises:
        ShardingError: The rules do not fit the checkpoint at any size: as `checked_groups` says.
    """
    nowhere_else = np.zeros(len(index), dtype=np.int64)
    grouped = group_tensors(index, kinds_of_tensors(index), rules, [ALL_RANKS], nowhere_else, unmatched)
    return _legal_among(grouped.groups, Mesh())


def _cannot_split(
    index: CheckpointIndex, mesh: Mesh, refusals: Sequence[tuple[TensorGroup, str]], legal: tuple[int, ...]
) -> str:
    num_tensors = sum(group.num_tensors for group, _ in refusals)
    lines = [f"{counted(num_tensors, 'tensor')} of {index.uri} cannot be split over tp={mesh.tp}:"]
    for group, refusal in refusals[:_NUM_SHOWN]:
        alike = f" and {group.num_tensors - 1} alike" if group.num_tensors > 1 else ""
        lines.append(f"  {named(index, group.example)}{alike}: {refusal}")
    if len(refusals) > _NUM_SHOWN:
        lines.append(f"  and {len(refusals) - _NUM_SHOWN} more kinds of tensors")
    works = f"tp that works for every tensor: {', '.join(map(str, legal))}" if legal else "no tp works with these rules"
    return "\n".join([*lines, works])


def _legal_among(groups: Sequence[TensorGroup], mesh: Mesh) -> tuple[int, ...]:
    """Sizes of tp that work with the other sizes of `mesh`; experts that are whole on every rank stay whole."""
    meshes: list[Mesh] = []
    for tp in range(1, LARGEST_TP + 1):
        if mesh.expert_tp == 1 and mesh.ep > 1:
            meshes.append(Mesh(tp=tp, ep=tp))
        elif tp % mesh.ep == 0:
            meshes.append(Mesh(tp=tp, ep=mesh.ep))
    return tuple(mesh.tp for mesh in meshes if not any(group.refusal(mesh) for group in groups))
