"""Where does each part of a fused result begin? Parts lie one after the other along one dimension, as long as each rank's are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.companion import Companion
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.sharding.groups import TensorGroup
    from ray_streamer.sharding.mesh import Mesh, MeshPosition
    from ray_streamer.sharding.stored_form import StoredForm
    from ray_streamer.sharding.tensor_slice import TensorSlice


@dataclass(frozen=True, slots=True)
class FusedParts:
    """The parts of one result.

    Attributes:
        parts: What a rank holds of each tensor.
        offsets: Where each part begins, in elements of the result.
        shape: Of the result.
    """

    parts: tuple[TensorSlice, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What results have in common in which tensors of several modules lie one after the other.

    Attributes:
        name: Of one such result, for messages.
        dim: Dimension of the result along which they do; numbers without dimensions become slots of a row.
        members: How the tensors lie, in order.
        forms: How each one holds its quantized weight; None where it belongs to none.
    """

    name: str
    dim: int
    members: tuple[TensorGroup, ...]
    forms: tuple[StoredForm | None, ...]

    def parts(self, mesh: Mesh, at: MeshPosition) -> FusedParts | None:
        """What ranks at this position hold; None when nothing.

        Raises:
            ShardingError: The tensors of such a rank do not fit together.
        """
        held = [member.slice_of(mesh, at) for member in self.members]
        parts = [part for part in held if part is not None]
        if not parts:
            return None
        if len(parts) < len(held):
            raise ShardingError(f"{self.name} cannot be fused: {_ranks(at)} hold some of its parts and not the others")
        shapes = [part.shape or (1,) for part in parts]
        others = {(*shape[: self.dim], *shape[self.dim + 1 :]) for shape in shapes}
        if len(others) > 1 or any(part.is_padded for part in parts):
            raise ShardingError(
                f"{self.name} cannot be fused: the parts of {_ranks(at)} have the shapes {shapes}, or are padded"
            )
        for number, part in enumerate(parts[:-1]):
            self._check_whole_blocks(number, part, mesh, at)
        lengths = [shape[self.dim] for shape in shapes]
        shape = (*shapes[0][: self.dim], sum(lengths), *shapes[0][self.dim + 1 :])
        return FusedParts(tuple(parts), _offsets(lengths, row_major(shape)[self.dim]), shape)

    def _check_whole_blocks(self, number: int, part: TensorSlice, mesh: Mesh, at: MeshPosition) -> None:
        """What follows must begin at a step of its own: a shorter last block may be the last of all only."""
        form = self.forms[number]
        if form is None or not form.dims:
            return
        stored = form.dims[self.dim]
        if stored.weight_dim is None:
            self._check_one_block(number, mesh, at)
            return
        whole = form.weight_shape[stored.weight_dim]
        last = stored.num_steps(whole)
        if whole * stored.steps % stored.elements and any(held.stop == last for held in part.indices[self.dim]):
            raise ShardingError(
                f"{self.name} cannot be fused: {whole} indices of one part are no whole blocks of {stored.elements}"
            )

    def _check_one_block(self, number: int, mesh: Mesh, at: MeshPosition) -> None:
        """A part with one scale for all of its weight, beside others that have one for each block, fills its block."""
        sizes = [form.dims[self.dim].elements for form in self.forms if form is not None and form.dims]
        block, placement = max(sizes, default=1), self.members[number].placement
        if block == 1 or not isinstance(placement, Companion):
            return
        tp = self.members[number].holders.tp(mesh)
        weight = placement.weight.share_of(placement.weight_shape, tp_index=at.tp % tp, tp=tp)
        if weight is not None and weight.shape[0] % block:
            raise ShardingError(
                f"{self.name} cannot be fused: {_ranks(at)} hold {weight.shape[0]} outputs of a part, which do not fill its one block of "
                f"{block}; load without fuse"
            )


def _offsets(lengths: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(length * stride for length in accumulate(lengths[:-1], initial=0))


def _ranks(at: MeshPosition) -> str:
    """A position in words."""
    stage = f" of stage {at.pp}" if at.pp else ""
    return f"the ranks with tp index {at.tp}{stage}"
