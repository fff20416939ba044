"""What does an operation of the loader do to what is recorded? Each one comes here, with lazy tensors or with real ones.

    views of a lazy tensor            are lazy, and read nothing
    copies of a lazy tensor           into new memory are lazy; into real memory they are written down, and nothing is written
    anything else with a lazy tensor  reads the tensors that it stands for, whole, now
    real memory                       that is read or overwritten where a copy was written down: that copy is made first

So a loader that nobody knew is slower, never wrong.
"""

# pyright: reportPrivateUsage=false
# Names of a lazy tensor begin with _lazy_, since Tensor has most others; torch offers some things under private names only.
from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.capture.lazy import LazyTensor, tensors_among, with_each
from ray_streamer.capture.memory import Memory, Taken, TensorElements, seen, view_of
from ray_streamer.capture.operations import OperationKind, operation_kind, written_arguments
from ray_streamer.capture.pending import Pending, RecordedCopy
from ray_streamer.capture.strided import Loop, Strided, holds
from ray_streamer.errors import CaptureError
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.capture.memory import TensorLoops
    from ray_streamer.capture.whole_tensors import WholeTensors

CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Elements of these dtypes are cast to each other on their way into a result, bit for bit as `copy_` does."""

_NO_DISPATCH = getattr(torch.Tensor, "__torch_dispatch__")  # noqa: B009
"""What tensors have whose operations go to torch itself."""

_CPU = torch.device("cpu")
_BATCH_BYTES = 256 << 20
"""Whole tensors that are read at once for copies that must be made early."""


class OperationRecorder:
    """What one rank's loader did so far.

    Attributes:
        pending: Copies that are written down.
        early: Tensors of copies that had to be made at once, since the loader touched their target again.
        reasons: For each tensor that was read whole for its values: the operation that first needed them.
    """

    def __init__(self, whole: WholeTensors) -> None:
        self.pending = Pending()
        self.early: dict[str, None] = {}
        self.reasons: dict[str, str] = {}
        self._whole = whole

    def lazy(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, is_plannable: bool) -> LazyTensor:
        """The tensor `name` of the checkpoint, not read yet."""
        view = Strided(shape, row_major(shape), 0)
        place = TensorElements(name, dtype, view)
        return LazyTensor(self, Memory(shape, dtype, _CPU, [place], is_plannable=is_plannable), view)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's outcome, as the loader sees it."""
        kind = operation_kind(func)
        if kind is OperationKind.VIEW and not isinstance(args[0], LazyTensor):
            return func(*args, **kwargs)
        lazies = [found for found in tensors_among(args, kwargs) if isinstance(found, LazyTensor)]
        if not lazies:
            return self._run_on_real(kind, func, args, kwargs)
        outcome = self._run_lazily(kind, func, args, kwargs, lazies)
        return self._run_with_values(kind, func, args, kwargs) if outcome is None else outcome

    def real(self, lazy: LazyTensor, *, is_written: bool, reason: str = "its memory") -> torch.Tensor:
        """The view of real memory that `lazy` stands for; of memory of our own when it is to be written to."""
        memory = lazy._lazy_memory
        if memory.value is None:
            for name in memory.tensors:
                self.reasons.setdefault(name, reason)
        value = memory.own(self._whole) if is_written or memory.taken else memory.read(self._whole)
        self._share_taken(memory, value)
        return seen(value, lazy._lazy_view)

    def take(self, target: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
        """Memory for `target` whose elements are those of `lazy`, as `target.data = lazy` wants it; filled later if it can be.

        Both are one memory for the loader. Whoever needs the elements of `lazy` again gets what `target` made of them.
        """
        memory, view = lazy._lazy_memory, lazy._lazy_view
        made = torch.empty_like(lazy)
        if isinstance(target, LazyTensor) or view.repeats or not self.record(made, lazy):
            return self.real(lazy, is_written=True)
        memory.taken.append(Taken(view, target, made))
        return made

    def _share_taken(self, memory: Memory, value: torch.Tensor) -> None:
        """Tensors that took views of `memory` move into `value` with what they hold, so that they are one memory in fact."""
        while memory.taken:
            taken = memory.taken.pop()
            self.make_early(self.pending.in_storage(taken.made))
            shared = seen(value, taken.view)
            shared.copy_(taken.made)
            if taken.target.untyped_storage()._cdata == taken.made.untyped_storage()._cdata:
                taken.target.data = shared

    def make_early(self, copies: Sequence[RecordedCopy]) -> None:
        """Makes copies now that were only written down."""
        waiting = defaultdict(list)
        for copy in copies:
            waiting[copy.piece.place.tensor].append(copy)
        for names in self._whole.batches(list(waiting), batch_bytes=_BATCH_BYTES):
            values = self._whole.read(names)
            for name in names:
                self.early[name] = None
                for copy in waiting[name]:
                    self.pending.remove(copy)
                    target_of(copy).copy_(seen(values[name], copy.source))

    def record(self, target: torch.Tensor, lazy: LazyTensor) -> bool:
        """Writes down that `lazy` is copied into `target`; False when that cannot be written down."""
        memory = lazy._lazy_memory
        if not is_plain(target) or not self._is_castable(memory, target.dtype):
            return False
        if not target.numel():
            return True
        view, whole = lazy._lazy_view, view_of(target)
        if view.shape != whole.shape:
            view = view_of(lazy._lazy_shadow.expand(whole.shape))
        pieces = memory.pieces(view, whole.strides)
        if pieces is None or whole.repeats:
            return False
        copies = [_copy_of(piece, target) for piece in pieces]
        self._make_room(target, copies[0].extent if len(copies) == 1 else whole.in_bytes(target.element_size()))
        for copy in copies:
            self.pending.add(copy)
        return True

    def _make_room(self, target: torch.Tensor, extent: Strided) -> None:
        """What is written where something else is to be written now is made first, or forgotten if nothing of it will remain."""
        for older in self.pending.meeting_bytes(target.untyped_storage(), extent):
            if holds(extent, older.extent):
                self.pending.remove(older)
            else:
                self.make_early([older])

    def _run_lazily(self, kind: OperationKind, func: Any, args: Any, kwargs: Any, lazies: list[LazyTensor]) -> Any:
        """The outcome without any values; None when they are needed."""
        lazy = lazies[0]
        if kind is OperationKind.VIEW and len(lazies) == 1:
            return self._view(lazy, func, args, kwargs)
        if kind is OperationKind.SHAPE_ONLY:
            return func(*_shadows(args), **{**kwargs, "device": kwargs.get("device") or lazy.device})
        if kind is OperationKind.QUESTION:
            return False
        if kind is OperationKind.DUPLICATE:
            return self._duplicate(lazy, func, args, kwargs)
        if kind is OperationKind.JOIN and len(lazies) == len(args[0]):
            return self._join(lazies, func, args, kwargs)
        if kind is OperationKind.COPY_INTO and not isinstance(args[0], LazyTensor):
            if args[0].is_meta:
                return func(args[0], lazy._lazy_shadow)
            return args[0] if self.record(args[0], lazy) else None
        if kind is OperationKind.RESHAPES_IN_PLACE and isinstance(args[0], LazyTensor):
            raise CaptureError(f"the loader called {func} on {lazy!r}, which cannot change its shape in place")
        return None

    def _view(self, lazy: LazyTensor, func: Any, args: Any, kwargs: Any) -> Any:
        shadow = lazy._lazy_shadow
        outcome = func(*_shadows(args), **kwargs)
        storage = shadow.untyped_storage()._cdata
        for view in outcome if isinstance(outcome, list | tuple) else (outcome,):
            if view.dtype != shadow.dtype or view.untyped_storage()._cdata != storage:
                return None
        if isinstance(outcome, list | tuple):
            return type(outcome)([LazyTensor(self, lazy._lazy_memory, view_of(view)) for view in outcome])
        return LazyTensor(self, lazy._lazy_memory, view_of(outcome))

    def _duplicate(self, lazy: LazyTensor, func: Any, args: Any, kwargs: Any) -> LazyTensor | None:
        memory = lazy._lazy_memory
        dtype, device = kwargs.get("dtype") or lazy.dtype, torch.device(kwargs.get("device") or lazy.device)
        if device.type == "meta" or kwargs.get("pin_memory") or not self._is_castable(memory, dtype):
            return None
        asked = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
        shape_of_copy = func(lazy._lazy_shadow, *args[1:], **asked)
        # Copies keep the order of their dimensions in memory, so the new memory is row-major in that order.
        order = sorted(range(shape_of_copy.dim()), key=lambda dim: -shape_of_copy.stride(dim))
        place = self._place_of(view_of(lazy._lazy_shadow.permute(order)), memory)
        if place is None:
            return None
        shape = tuple(shape_of_copy.shape[dim] for dim in order)
        inverse = [order.index(dim) for dim in range(len(order))]
        made = Memory(shape, dtype, device, [place])
        return LazyTensor(self, made, view_of(made.shadow.permute(inverse)))

    def _join(self, lazies: list[LazyTensor], func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
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
        places = [self._place_of(view_of(shadow), lazy._lazy_memory) for shadow, lazy in kept]
        if any(place is None for place in places):
            return self._join_in_memory(kept, joined, dim)
        lengths = [shadow.shape[dim] for shadow, _ in kept]
        shape = tuple(joined.shape)
        memory = Memory(shape, joined.dtype, lazies[0].device, [p for p in places if p], lengths=lengths, dim=dim)
        return LazyTensor(self, memory, Strided(shape, row_major(shape), 0))

    def _join_in_memory(
        self, parts: Sequence[tuple[torch.Tensor, LazyTensor]], joined: torch.Tensor, dim: int
    ) -> torch.Tensor:
        """The joined memory itself, into which each part's copy is written down: of parts that were joined themselves."""
        made = torch.empty(joined.shape, dtype=joined.dtype, device=parts[0][1].device)
        start = 0
        for shadow, lazy in parts:
            length = shadow.shape[dim]
            target, part = made.narrow(dim, start, length), LazyTensor(self, lazy._lazy_memory, view_of(shadow))
            if not self.record(target, part):
                target.copy_(self.real(part, is_written=False, reason="a cat of what was joined before"))
            start += length
        return made

    def _place_of(self, view: Strided, memory: Memory) -> TensorElements | None:
        """Where in one tensor of the checkpoint the elements of that view of `memory` are, in row-major order."""
        pieces = memory.pieces(view, row_major(view.shape)) if view.num_elements else None
        if not pieces or len(pieces) > 1:
            return None
        loops = pieces[0].loops or (Loop(1, 1, 1),)
        found = Strided(tuple(loop.size for loop in loops), tuple(loop.step for loop in loops), pieces[0].offset)
        return TensorElements(pieces[0].place.tensor, pieces[0].place.dtype, found)

    def _is_castable(self, memory: Memory, dtype: torch.dtype) -> bool:
        if dtype == memory.dtype:
            return True
        return not memory.is_cast and {dtype, memory.dtype} <= CASTABLE

    def _run_with_values(self, kind: OperationKind, func: Any, args: Any, kwargs: Any) -> Any:
        written = written_arguments(func)
        lazies: dict[int, LazyTensor] = {}

        def valued(lazy: LazyTensor, is_written: bool) -> torch.Tensor:
            tensor = self.real(lazy, is_written=is_written, reason=str(func))
            lazies[id(tensor)] = lazy
            return tensor

        def with_values(key: int | str, value: Any) -> Any:
            # What a view of real memory is written to later, nobody would see.
            is_written = key in written or kind is OperationKind.VIEW or kind is OperationKind.RESHAPES_IN_PLACE
            return with_each(value, lambda lazy: valued(lazy, is_written))

        real = tuple(with_values(at, value) for at, value in enumerate(args))
        named = {name: with_values(name, value) for name, value in kwargs.items()}
        outcome = self._run_on_real(kind, func, real, named)
        if isinstance(outcome, list | tuple):
            return type(outcome)([lazies.get(id(tensor), tensor) for tensor in outcome])
        return lazies.get(id(outcome), outcome)

    def _run_on_real(self, kind: OperationKind, func: Any, args: Any, kwargs: Any) -> Any:
        if self.pending and kind not in (OperationKind.VIEW, OperationKind.SHAPE_ONLY, OperationKind.QUESTION):
            meets = self.pending.in_storage if kind is OperationKind.RESHAPES_IN_PLACE else self.pending.meeting
            for tensor in tensors_among(args, kwargs):
                if is_plain(tensor):
                    self.make_early(meets(tensor))
        return func(*args, **kwargs)


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor whose elements lie in a storage as its strides say."""
    return (
        isinstance(tensor, torch.Tensor)
        and getattr(type(tensor), "__torch_dispatch__", None) is _NO_DISPATCH
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def target_of(copy: RecordedCopy) -> torch.Tensor:
    """The view of real memory that `copy` goes to."""
    return whole_storage(copy.storage, copy.dtype, copy.device).as_strided(
        copy.target.shape, copy.target.strides, copy.target.offset
    )


def whole_storage(storage: torch.UntypedStorage, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All of a storage, as elements of one dtype."""
    return torch.empty(0, dtype=dtype, device=device).set_(storage)


def _copy_of(piece: TensorLoops, target: torch.Tensor) -> RecordedCopy:
    offset = int(target.storage_offset()) + piece.other_offset
    loops = piece.loops
    view = Strided(tuple(loop.size for loop in loops), tuple(loop.other_step for loop in loops), offset)
    extent = view.in_bytes(target.element_size())
    return RecordedCopy(piece, target.untyped_storage(), target.dtype, offset, target.device, extent)


def _shadows(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(with_each(value, lambda lazy: lazy._lazy_shadow) for value in args)
