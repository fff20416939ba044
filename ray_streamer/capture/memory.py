"""What does a lazy tensor stand for? Elements of checkpoint tensors, laid one after the other, that nobody has read yet.

A lazy tensor is a view of such a memory. The first memory of a tensor is the tensor itself; `clone`, `contiguous`, `to` and
`cat` make further ones, which are still nothing but places in the checkpoint. A memory is read when its values are needed,
and from then on it has them: whoever views it sees what was read, and what was written to it since.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from ray_streamer.capture.strided import (
    CopiedPart,
    Loop,
    Strided,
    digits_of,
    holds,
    may_meet,
    merged_loops,
    seen_through,
    split_loops,
)
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.capture.whole_tensors import WholeTensors


_CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Elements of these dtypes are cast to each other on their way into a result, bit for bit as `copy_` does."""


@dataclass(frozen=True, slots=True)
class TensorElements:
    """Elements of one tensor of the checkpoint, in the order of `view`, whose dimensions may be split ones.

    Attributes:
        tensor: Name.
        dtype: As the checkpoint stores it.
        view: In elements of it.
    """

    tensor: str
    dtype: torch.dtype
    view: Strided


@dataclass(frozen=True, slots=True)
class TensorLoops:
    """A part of a copy out of a lazy tensor: loops over one tensor of the checkpoint.

    Attributes:
        place: Where the elements come from; only its tensor and dtype count.
        loops: Steps are in elements of the tensor, other steps in elements of the copy's target.
        offset: Of the first element, in the tensor.
        other_offset: Of the first element, from that of the copy's target.
    """

    place: TensorElements
    loops: tuple[Loop, ...]
    offset: int
    other_offset: int


class Memory:
    """Contiguous elements of one dtype: parts next to each other along one dimension.

    Args:
        shape: Of all parts together; row-major.
        dtype: Of the elements; another one than a part's means that they are cast.
        device: Where whoever asks for values expects them.
        places: One for each part.
        lengths: Of each part along `dim`.
        dim: The dimension along which parts lie next to each other.
        is_plannable: Whether copies of its elements can be written down at all.

    Attributes:
        value: The elements, once somebody needed them.
        taken: Views that tensors of the loader's have taken over, as by `tensor.data = lazy`: they are views of `backing`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        places: Sequence[TensorElements],
        *,
        lengths: Sequence[int] = (),
        dim: int = 0,
        is_plannable: bool = True,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.places, self.is_plannable = tuple(places), is_plannable
        self._lengths, self._dim = tuple(lengths), dim
        # The memory is the checkpoint's tensor itself, as is most often the case.
        self._is_tensor = len(places) == 1 and places[0].view == Strided(shape, row_major(shape), 0)
        self.value: torch.Tensor | None = None
        self.taken: list[Strided] = []
        self._backing: torch.Tensor | None = None
        self._is_own = False
        self._shadow: torch.Tensor | None = None

    @classmethod
    def of_real(cls, value: torch.Tensor) -> Memory:
        """Real memory, contiguous, that lazy tensors are to be views of."""
        memory = cls(tuple(value.shape), value.dtype, value.device, ())
        memory.value, memory._is_own = value, True
        return memory

    @property
    def shadow(self) -> torch.Tensor:
        """A meta tensor like it."""
        if self._shadow is None:
            self._shadow = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._shadow

    @property
    def is_cast(self) -> bool:
        """Whether elements change their dtype on the way from the checkpoint."""
        return any(place.dtype != self.dtype for place in self.places)

    def is_castable(self, dtype: torch.dtype) -> bool:
        """Whether a copy into elements of `dtype` can be planned."""
        return dtype == self.dtype or (not self.is_cast and {dtype, self.dtype} <= _CASTABLE)

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors whose elements these are."""
        return [place.tensor for place in self.places]

    def read(self, whole: WholeTensors) -> torch.Tensor:
        """The values, of `shape`, read now if nobody needed them before; not to be written to unless `own` was called."""
        if self.value is None:
            self.value = self._read(whole)
        return self.value

    def own(self, whole: WholeTensors) -> torch.Tensor:
        """The values, as memory of our own that may be written to."""
        value = self.read(whole)
        if not self._is_own:
            self.value = value = value.clone(memory_format=torch.contiguous_format)
            self._is_own = True
        return value

    def pieces(self, view: Strided, other_strides: Sequence[int]) -> list[TensorLoops] | None:
        """A copy out of `view` of this memory, as loops over the checkpoint's tensors; None where it is none.

        Args:
            view: In elements of this memory.
            other_strides: Of the copy's target, whose shape is the view's.
        """
        loops = [Loop(*loop) for loop in zip(view.shape, view.strides, other_strides, strict=True)]
        if not self.is_plannable or self.value is not None or not self.places or self.is_taken(view):
            return None
        if self._is_tensor:
            return [TensorLoops(self.places[0], tuple(merged_loops(loops)), view.offset, 0)]
        if len(self.places) == 1:
            return self._through(0, loops, view.offset, 0)
        return self._out_of_parts(loops, view.offset)

    @property
    def backing(self) -> torch.Tensor:
        """Real memory, of `shape`, for what was taken over; it holds nothing before somebody fills it."""
        if self._backing is None:
            self._backing = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self._backing

    def is_taken(self, view: Strided) -> bool:
        """Whether a tensor of the loader's may have an element of that view, and so may have changed it."""
        return any(may_meet(view, taken) for taken in self.taken)

    def has_taken(self, view: Strided) -> bool:
        """Whether one tensor of the loader's has all elements of that view."""
        return any(holds(taken, view) for taken in self.taken)

    def fill_backing(self, whole: WholeTensors) -> None:
        """The backing becomes the values: what was taken over, as the loader made it, and the rest as it is in the checkpoint."""
        if not any(taken.is_dense and taken.num_elements == prod(self.shape) for taken in self.taken):
            values = self._read(whole).clone(memory_format=torch.contiguous_format)
            for taken in self.taken:
                seen(values, taken).copy_(seen(self.backing, taken))
            self.backing.copy_(values)
        self.value, self._is_own = self.backing, True
        self.taken.clear()

    def _read(self, whole: WholeTensors) -> torch.Tensor:
        values = whole.read(self.tensors)
        first = self.places[0]
        tensor = values[first.tensor]
        if self._is_tensor and not self.is_cast:
            return tensor.to(self.device)
        filled = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        starts = self._starts()
        for place, start, length in zip(self.places, starts, self._all_lengths(), strict=True):
            part = filled.narrow(self._dim, start, length) if self.shape else filled
            part.copy_(seen(values[place.tensor], place.view).reshape(part.shape))
        self._is_own = True
        return filled

    def _all_lengths(self) -> tuple[int, ...]:
        return self._lengths or ((self.shape[self._dim] if self.shape else 1),)

    def _starts(self) -> list[int]:
        lengths = self._all_lengths()
        return [sum(lengths[:number]) for number in range(len(lengths))]

    def _through(self, number: int, loops: list[Loop], offset: int, other_offset: int) -> list[TensorLoops] | None:
        place = self.places[number]
        found = seen_through(place.view, loops, offset)
        if found is None:
            return None
        return [
            TensorLoops(place, tuple(merged_loops(through)), start, other_offset + other)
            for through, start, other in found
        ]

    def _out_of_parts(self, loops: list[Loop], offset: int) -> list[TensorLoops] | None:
        """The view cut at the borders between parts, and each cut seen through its part."""
        grid = (prod(self.shape[: self._dim]), self.shape[self._dim], prod(self.shape[self._dim + 1 :]))
        parts = split_loops(grid, loops, offset)
        if parts is None:
            return None
        pieces: list[TensorLoops] = []
        for part in parts:
            cut = self._cut_at_borders(grid, part)
            if cut is None:
                return None
            pieces += cut
        return pieces

    def _cut_at_borders(self, grid: tuple[int, int, int], part: CopiedPart) -> list[TensorLoops] | None:
        along = [loop for dim, loop in part.loops if dim == 1]
        if len(along) > 1:
            return None
        outer, middle, inner = digits_of(grid, part.offset)
        step = along[0].step // grid[2] if along else 1
        num_steps = along[0].size if along else 1
        pieces: list[TensorLoops] = []
        for number, (start, length) in enumerate(zip(self._starts(), self._all_lengths(), strict=True)):
            low = max(0, -(-(start - middle) // step))
            high = min(num_steps, -(-(start + length - middle) // step))
            if low >= high:
                continue
            loops = [_resized(dim, loop, grid, (grid[0], length, grid[2]), high - low) for dim, loop in part.loops]
            begin = (outer * length + middle + low * step - start) * grid[2] + inner
            other_offset = part.other_offset + (low * along[0].other_step if along else 0)
            found = self._through(number, loops, begin, other_offset)
            if found is None:
                return None
            pieces += found
        return pieces


def view_of(tensor: torch.Tensor) -> Strided:
    """The tensor as a view of its storage, in elements."""
    return Strided(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def seen(tensor: torch.Tensor, view: Strided) -> torch.Tensor:
    """That view of a contiguous `tensor`."""
    return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)


def _resized(dim: int, loop: Loop, grid: tuple[int, ...], part: tuple[int, ...], size: int) -> Loop:
    """A loop over dimension `dim` of `grid`, over one of its parts; `size` is what of it is left along the cut dimension."""
    return replace(
        loop,
        size=size if dim == 1 else loop.size,
        step=loop.step // (grid[1] * grid[2]) * part[1] * part[2] if dim == 0 else loop.step,
    )


def is_direct(tensor: torch.Tensor) -> bool:
    """Whether its elements are those in memory, and not conjugated or negated whenever somebody looks."""
    return not tensor.is_conj() and not tensor.is_neg()
