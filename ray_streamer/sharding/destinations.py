"""Into which result does a tensor go, and where in it? One answer for all tensors alike: a few dozen for 92,000 tensors.

    all tensors ─> groups (alike in rule and shape) ─> destinations (alike in dtype and place in their results, too)

What a rank holds follows by asking every destination once, and gathering the answers into columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.dtypes import DTYPES
from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct_rows
from ray_streamer.sharding.cast import result_dtypes
from ray_streamer.sharding.fuse import find_fused
from ray_streamer.sharding.rename import renamed
from ray_streamer.slices.result import ResultForm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.fuse import FusedTensors, FuseLike
    from ray_streamer.sharding.fusion import Fusion
    from ray_streamer.sharding.groups import TensorGroup, TensorGroups
    from ray_streamer.sharding.mesh import Mesh, MeshPosition
    from ray_streamer.sharding.name_kinds import NameKinds
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.slices.rank_slices import Pattern


class RankMoves(NamedTuple):
    """How one tensor comes to its result on one rank.

    Attributes:
        pattern: Moves from the tensor into its result.
        offset: Added to the target offset of every move, in elements of the result.
        form: Of the result.
    """

    pattern: Pattern
    offset: int
    form: ResultForm


@dataclass(frozen=True, slots=True)
class Destination:
    """Where tensors go that go alike.

    Attributes:
        group: How they lie.
        dtype: Of their results.
        fusion: With which others they share a result; None when each has one of its own.
        place: Which of those they are.
    """

    group: TensorGroup
    dtype: str
    fusion: Fusion | None = None
    place: int = 0

    def on(self, mesh: Mesh, at: MeshPosition) -> RankMoves | None:
        """The moves on ranks at this position of `mesh`; None when nothing of these tensors goes there."""
        if self.fusion is None:
            part = self.group.slice_of(mesh, at)
            if part is None:
                return None
            return RankMoves(
                part.moves(self.group.shape, part.shape), 0, ResultForm(dtype=self.dtype, shape=part.shape)
            )
        fused = self.fusion.parts(mesh, at)
        if fused is None:
            return None
        moves = fused.parts[self.place].moves(self.group.shape, fused.shape)
        return RankMoves(moves, fused.offsets[self.place], ResultForm(dtype=self.dtype, shape=fused.shape))


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Every tensor's destination and result.

    Attributes:
        distinct: The distinct ones.
        ids: For each tensor of the index the position of its destination; int32.
        result_ids: For each tensor the position of its result; int32. -1 where no rank holds anything of it.
        names: Of the results, in order of their first tensor; no two alike.
    """

    distinct: tuple[Destination, ...]
    ids: NDArray[np.int32] = field(repr=False)
    result_ids: NDArray[np.int32] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)


def find_destinations(
    index: CheckpointIndex,
    names: NameKinds,
    grouped: TensorGroups,
    mesh: Mesh,
    *,
    fuse: FuseLike,
    rename: RenameLike | None,
    dtype: DTypeLike,
) -> Destinations:
    """Where all tensors of a checkpoint go.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        grouped: How they lie.
        mesh: The grid of ranks.
        fuse: Which modules' tensors share results.
        rename: What results are called.
        dtype: What results are cast to.

    Raises:
        ShardingError: Tensors that are to share a result do not fit together on some rank, or two results would have one name.
    """
    fused = find_fused(index, names, grouped, fuse)
    _check_fusions(fused, mesh)
    codes = result_dtypes(index, names, grouped.quantized, dtype)
    mixed = np.flatnonzero(codes[fused.leaders] != codes)
    if len(mixed):
        result = fused.names[int(fused.leaders[mixed[0]])]
        raise ShardingError(f"{result} is fused of tensors that dtype={dtype!r} casts differently")
    alike = distinct_rows([grouped.ids, fused.fusion_ids, fused.places, codes])
    distinct = tuple(
        Destination(grouped.groups[group], DTYPES[code].name, fused.fusions[fusion] if fusion >= 0 else None, place)
        for group, fusion, place, code in alike.values()
    )
    is_held = np.array([_is_held(group, mesh) for group in grouped.groups], dtype=bool)[grouped.ids]
    is_first = is_held & (fused.leaders == np.arange(len(index)))
    result_ids = np.where(is_held, (np.cumsum(is_first) - 1)[fused.leaders], -1)
    result_names = _result_names(index, np.flatnonzero(is_first), fused, rename)
    return Destinations(distinct, alike.ids.astype(np.int32), result_ids.astype(np.int32), result_names)


def _is_held(group: TensorGroup, mesh: Mesh) -> bool:
    """Whether any rank holds a share of these tensors, if only an empty one."""
    tp = group.holders.tp(mesh)
    return any(group.placement.share_of(group.shape, tp_index=index, tp=tp) is not None for index in range(tp))


def _check_fusions(fused: FusedTensors, mesh: Mesh) -> None:
    """Refuses on every rank what cannot be fused on some."""
    positions = {mesh.position(rank): None for rank in range(mesh.num_ranks)} if fused.fusions else {}
    for fusion in fused.fusions:
        for at in positions:
            fusion.parts(mesh, at)


def _result_names(
    index: CheckpointIndex, firsts: NDArray[np.int64], fused: FusedTensors, rename: RenameLike | None
) -> tuple[str, ...]:
    if len(firsts) == len(index) and not fused.names:
        names = index.names
    else:
        names = tuple(map(index.names.__getitem__, firsts.tolist()))
        if fused.names:
            names = tuple(fused.names.get(tensor, name) for tensor, name in zip(firsts.tolist(), names, strict=True))
    if fused.names and len(set(names)) < len(names):
        taken = next(name for name in fused.names.values() if index.find(name) is not None)
        raise ShardingError(f"{index.uri}: {taken} cannot be fused: the checkpoint has such a tensor, too")
    return names if rename is None else renamed(names, rename)
