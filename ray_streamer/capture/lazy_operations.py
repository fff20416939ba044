"""What comes of an operation on lazy tensors that needs no values? Views, copies and joins of them are lazy, too.

Each function gives None where values are needed after all.
"""

# pyright: reportPrivateUsage=false
# Names of a lazy tensor begin with _lazy_, since Tensor has most others; torch offers some things under private names only.
from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.capture.lazy import LazyTensor, with_each
from ray_streamer.capture.memory import Memory, TensorElements, is_direct, view_of
from ray_streamer.capture.strided import Loop, Strided
from ray_streamer.errors import CaptureError
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Sequence


def lazy_view(lazy: LazyTensor, func: Any, args: Any, kwargs: Any) -> Any:
    """Views of a lazy tensor."""
    shadow = lazy._lazy_shadow
    outcome = func(*shadows(args), **kwargs)
    storage = shadow.untyped_storage()._cdata
    for view in outcome if isinstance(outcome, list | tuple) else (outcome,):
        if view.dtype != shadow.dtype or view.untyped_storage()._cdata != storage or not is_direct(view):
            return None
    if isinstance(outcome, list | tuple):
        return type(outcome)([LazyTensor(lazy._lazy_recorder, lazy._lazy_memory, view_of(view)) for view in outcome])
    return LazyTensor(lazy._lazy_recorder, lazy._lazy_memory, view_of(outcome))


def reshape_in_place(lazy: LazyTensor, func: Any, args: Any, kwargs: Any) -> LazyTensor:
    """The tensor itself, of another shape.

    Raises:
        CaptureError: It was given other memory than it has.
    """
    memory, shadow = lazy._lazy_memory, lazy._lazy_shadow
    storage = shadow.untyped_storage()._cdata
    func(shadow, *shadows(args[1:]), **kwargs)
    view = view_of(shadow)
    if shadow.untyped_storage()._cdata != storage or shadow.dtype != memory.dtype or view.stop > prod(memory.shape):
        raise CaptureError(f"the loader called {func} on {lazy!r}, which gives it other memory than the checkpoint's")
    lazy._lazy_view = view
    lazy.data = LazyTensor(lazy._lazy_recorder, memory, view)
    return lazy


def duplicate(lazy: LazyTensor, func: Any, args: Any, kwargs: Any) -> LazyTensor | None:
    """A copy in new memory, perhaps of another dtype or on another device."""
    memory = lazy._lazy_memory
    dtype, device = kwargs.get("dtype") or lazy.dtype, torch.device(kwargs.get("device") or lazy.device)
    if device.type == "meta" or kwargs.get("pin_memory") or not memory.is_castable(dtype):
        return None
    asked = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    shape_of_copy = func(lazy._lazy_shadow, *args[1:], **asked)
    # Copies keep the order of their dimensions in memory, so the new memory is row-major in that order.
    order = sorted(range(shape_of_copy.dim()), key=lambda dim: -shape_of_copy.stride(dim))
    place = _place_of(view_of(lazy._lazy_shadow.permute(order)), memory)
    if place is None:
        return None
    shape = tuple(shape_of_copy.shape[dim] for dim in order)
    inverse = [order.index(dim) for dim in range(len(order))]
    made = Memory(shape, dtype, device, [place])
    return LazyTensor(lazy._lazy_recorder, made, view_of(made.shadow.permute(inverse)))


def join(lazies: list[LazyTensor], func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Lazy tensors next to each other in new memory."""
    shadows = [lazy._lazy_shadow for lazy in lazies]
    joined = func(shadows, *args[1:], **kwargs)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if func.overloadpacket is torch.ops.aten.stack:
        dim %= joined.dim()
        shadows = [shadow.unsqueeze(dim) for shadow in shadows]
    dim %= joined.dim()
    kept = [(shadow, lazy) for shadow, lazy in zip(shadows, lazies, strict=True) if shadow.numel()]
    if len({lazy.dtype for lazy in lazies}) > 1 or len({lazy.device for lazy in lazies}) > 1 or not kept:
        return None
    places = [_place_of(view_of(shadow), lazy._lazy_memory) for shadow, lazy in kept]
    if any(place is None for place in places):
        return _join_in_memory(kept, joined, dim)
    lengths = [shadow.shape[dim] for shadow, _ in kept]
    shape = tuple(joined.shape)
    memory = Memory(shape, joined.dtype, lazies[0].device, [p for p in places if p], lengths=lengths, dim=dim)
    return LazyTensor(lazies[0]._lazy_recorder, memory, Strided(shape, row_major(shape), 0))


def _join_in_memory(parts: Sequence[tuple[torch.Tensor, LazyTensor]], joined: torch.Tensor, dim: int) -> torch.Tensor:
    """The joined memory itself, into which each part's copy is written down: of parts that were joined themselves."""
    recorder = parts[0][1]._lazy_recorder
    made = torch.empty(joined.shape, dtype=joined.dtype, device=parts[0][1].device)
    start = 0
    for shadow, lazy in parts:
        length = shadow.shape[dim]
        target, part = made.narrow(dim, start, length), LazyTensor(recorder, lazy._lazy_memory, view_of(shadow))
        if not recorder.record(target, part):
            target.copy_(recorder.real(part, is_written=False, reason="a cat of what was joined before"))
        start += length
    return made


def _place_of(view: Strided, memory: Memory) -> TensorElements | None:
    """Where in one tensor of the checkpoint the elements of that view of `memory` are, in row-major order."""
    pieces = memory.pieces(view, row_major(view.shape)) if view.num_elements else None
    if not pieces or len(pieces) > 1:
        return None
    loops = pieces[0].loops or (Loop(1, 1, 1),)
    found = Strided(tuple(loop.size for loop in loops), tuple(loop.step for loop in loops), pieces[0].offset)
    return TensorElements(pieces[0].place.tensor, pieces[0].place.dtype, found)


def shadows(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with meta tensors in place of lazy ones."""
    return tuple(with_each(value, lambda lazy: lazy._lazy_shadow) for value in args)
