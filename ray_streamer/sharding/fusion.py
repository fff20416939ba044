"""Where does each part of a fused result begin? Parts lie one after the other along one dimension, as long as each rank's are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ray_streamer.errors import ShardingError
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
        for part, form in zip(parts[:-1], self.forms[:-1], strict=True):
            self._check_whole_blocks(part, form)
        lengths = [shape[self.dim] for shape in shapes]
        shape = (*shapes[0][: self.dim], sum(lengths), *shapes[0][self.dim + 1 :])
        return FusedParts(tuple(parts), _offsets(lengths, row_major(shape)[self.dim]), shape)

    def _check_whole_blocks(self, part: TensorSlice, form: StoredForm | None) -> None:
        """What follows must begin at a step of its own: a shorter last block may be the last of all only."""
        if form is None or not form.dims or (weight_dim := form.dims[self.dim].weight_dim) is None:
            return
        stored, whole = form.dims[self.dim], form.weight_shape[weight_dim]
        last = stored.num_steps(whole)
        if whole * stored.steps % stored.elements and any(held.stop == last for held in part.indices[self.dim]):
            raise ShardingError(
                f"{self.name} cannot be fused: {whole} indices of one part are no whole blocks of {stored.elements}"
            )


def _offsets(lengths: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(length * stride for length in accumulate(lengths[:-1], initial=0))


def _ranks(at: MeshPosition) -> str:
    """A position in words."""
    stage = f" of stage {at.pp}" if at.pp else ""
    return f"the ranks with tp index {at.tp}{stage}"
