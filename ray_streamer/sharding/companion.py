"""How does a tensor lie that belongs to a weight, such as its scales? As the weight does, counted in other steps.

Quantized checkpoints store a weight as several tensors: packed words, one scale for each channel, group or block, packed
zero points. A rule speaks of the weight, in its logical elements; here every edge of the weight's slices is carried over
to the stored tensor's dimensions. An edge that falls inside a step (the middle of a 128 x 128 block, of a packed word)
is refused: half of a step means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ray_streamer.sharding.placement import Placement, Replicate, Skip
from ray_streamer.sharding.tensor_slice import TensorSlice
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class StoredDim:
    """One dimension of a stored tensor: `steps` of its indices hold what belongs to `elements` of the weight's.

    Attributes:
        weight_dim: Dimension of the weight that it counts; None when it counts none, and every rank holds all of it.
        elements: Neighbouring elements of the weight that cannot be told apart here; where none is counted, those of a block that holds
            all of the weight, 1 when there are no blocks.
        steps: Stored indices that they take: 1 for scales and packed words, 3 for 32 elements of 3 bits in words of 32.
        uncut: Why no rank may hold a part of this dimension; empty when it may.
    """

    weight_dim: int | None
    elements: int = 1
    steps: int = 1
    uncut: str = ""

    def edge(self, edge: int, weight_size: int, stored_size: int) -> int | None:
        """The stored index at which what belongs to the weight's index `edge` begins; None inside of a step.

        The last step may be a shorter one: the end of the weight is the end of what is stored.

        >>> [StoredDim(0, elements=128).edge(edge, 576, 5) for edge in (0, 128, 288, 576)]
        [0, 1, None, 5]
        """
        if edge == weight_size:
            return stored_size
        steps, rest = divmod(edge * self.steps, self.elements)
        return None if rest else steps

    def num_steps(self, weight_size: int) -> int:
        """Stored indices for so many of the weight's."""
        return -(-weight_size * self.steps // self.elements)

    def stored_range(self, indices: range, weight_size: int, stored_size: int) -> range:
        """The stored indices of what belongs to `indices` of the weight; their edges lie between steps."""
        start, stop = (self.edge(edge, weight_size, stored_size) for edge in (indices.start, indices.stop))
        assert start is not None
        assert stop is not None
        return range(start, stop)

    def torn_edge(self, ranges: Sequence[range], weight_size: int, stored_size: int) -> int | None:
        """The first edge of `ranges` of the weight that lies inside of a step, here or in the result; None when there is none."""
        lands = accumulate(map(len, ranges), initial=0)
        for indices, land in zip(ranges, lands, strict=False):
            for edge in (indices.start, indices.stop):
                if self.edge(edge, weight_size, stored_size) is None:
                    return edge
            if land * self.steps % self.elements:
                return indices.start
        return None


@dataclass(frozen=True, slots=True)
class Companion(Placement):
    """The tensor lies as the weight that it belongs to.

    >>> from ray_streamer.sharding.placement import Split
    >>> scales = Companion(Split(1), (512, 1024), (StoredDim(0, 128), StoredDim(1, 128)))
    >>> scales.share_of((4, 8), tp_index=1, tp=2)
    TensorSlice(indices=((range(0, 4),), (range(4, 8),)), shape=(4, 4))

    Attributes:
        weight: How the weight lies.
        weight_shape: Logical elements of the weight.
        dims: What each dimension of the stored tensor counts.
    """

    weight: Placement
    weight_shape: tuple[int, ...]
    dims: tuple[StoredDim, ...]

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why the weight, or this tensor with it, cannot be placed on `tp` ranks, or None when it can."""
        if refused := self.weight.refusal(self.weight_shape, tp):
            return refused
        held = (self.weight.share_of(self.weight_shape, tp_index=index, tp=tp) for index in range(tp))
        refusals = (self._refusal_of(part, shape) for part in held if part is not None)
        return next((refused for refused in refusals if refused), None)

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice | None:
        """What belongs to the weight's slice of the rank at `tp_index`."""
        part = self.weight.share_of(self.weight_shape, tp_index=tp_index, tp=tp)
        if part is None:
            return None
        held = TensorSlice.whole(shape)
        for at, (dim, size) in enumerate(zip(self.dims, shape, strict=True)):
            if dim.weight_dim is None:
                continue
            whole = self.weight_shape[dim.weight_dim]
            ranges = [dim.stored_range(indices, whole, size) for indices in part.indices[dim.weight_dim]]
            held = held.with_indices(at, ranges, size=dim.num_steps(part.shape[dim.weight_dim]))
        return held

    def _refusal_of(self, part: TensorSlice, shape: tuple[int, ...]) -> str | None:
        for number, (dim, size) in enumerate(zip(self.dims, shape, strict=True)):
            if dim.weight_dim is None:
                continue
            whole = self.weight_shape[dim.weight_dim]
            if dim.num_steps(whole) != size:
                return f"dimension {number} has {counted(size, 'index', 'indices')}, and {whole} of the weight take {dim.num_steps(whole)}"
            ranges = part.indices[dim.weight_dim]
            if dim.uncut and ranges != (range(whole),):
                return dim.uncut
            torn = dim.torn_edge(ranges, whole, size)
            if torn is not None:
                return (
                    f"the weight is cut at index {torn} of its dimension {dim.weight_dim}, inside of the"
                    f" {dim.elements} that dimension {number} holds together"
                )
        return None


@dataclass(frozen=True, slots=True)
class Uncut(Placement):
    """A stored form that cannot be cut: held whole where its weight is replicated, skipped where it is skipped.

    Attributes:
        weight: How the weight should lie.
        reason: Why there is no part of it.
    """

    weight: Placement
    reason: str

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why, unless there is nothing to cut."""
        return None if tp == 1 or isinstance(self.weight, Replicate | Skip) else self.reason

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice | None:
        """All of it, or nothing."""
        return None if isinstance(self.weight, Skip) else TensorSlice.whole(shape)
