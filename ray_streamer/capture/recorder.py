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

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ray_streamer.capture.lazy import LazyTensor, tensors_among, with_each
from ray_streamer.capture.lazy_operations import duplicate, join, lazy_view, reshape_in_place, shadows
from ray_streamer.capture.memory import Memory, TensorElements, is_direct, seen, view_of
from ray_streamer.capture.operations import OperationKind, operation_kind, written_arguments
from ray_streamer.capture.pending import Pending, RecordedCopy
from ray_streamer.capture.strided import Strided, holds
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.capture.memory import TensorLoops
    from ray_streamer.capture.whole_tensors import WholeTensors

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
        self._exposed: dict[int, list[tuple[StorageWeakRef, int]]] = {}
        self._lock = threading.RLock()
        self._may_record = True
        self._is_over = False

    def lazy(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, is_plannable: bool) -> LazyTensor:
        """The tensor `name` of the checkpoint, not read yet."""
        view = Strided(shape, row_major(shape), 0)
        place = TensorElements(name, dtype, view)
        return LazyTensor(self, Memory(shape, dtype, _CPU, [place], is_plannable=is_plannable), view)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_watched: bool) -> Any:
        """The operation's outcome, as the loader sees it.

        Args:
            func: The operation, as `__torch_dispatch__` gets it.
            args: Its arguments.
            kwargs: Those that have names.
            is_watched: Whether every operation of this thread comes here. Else what it does to real memory is not known, and
                copies are made at once.
        """
        with self._lock:
            before, self._may_record = self._may_record, is_watched
            try:
                return self._run(func, args, kwargs)
            finally:
                self._may_record = before

    def expose(self, tensor: torch.Tensor) -> None:
        """The loader gets at real memory past torch: what is to be there is made, and later copies into it are made at once."""
        with self._lock:
            if is_plain(tensor) and not self._is_over:
                self.make_early(self.pending.in_storage(tensor))
                storage = tensor.untyped_storage()
                known = self._exposed.get(storage.data_ptr(), [])
                mine = StorageWeakRef(storage)
                # Memory that was given back may be another tensor's by now, which nobody has got at.
                alive = [(other, num_bytes) for other, num_bytes in known if other != mine and not other.expired()]
                self._exposed[storage.data_ptr()] = [*alive, (mine, storage.nbytes())]

    def end(self) -> None:
        """The loader is through: from now on nothing is written down, and tensors that it kept are read when they are used."""
        with self._lock:
            self._is_over = True

    @property
    def is_at_work(self) -> bool:
        """Whether this thread is in the middle of an operation: what it does now is not the loader's doing."""
        return self._lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        with self._lock:
            memory = lazy._lazy_memory
            if memory.value is None:
                for name in memory.tensors:
                    self.reasons.setdefault(name, reason)
                if memory.taken:
                    self.make_early(self.pending.in_storage(memory.backing))
                    memory.fill_backing(self._whole)
            value = memory.own(self._whole) if is_written else memory.read(self._whole)
            return seen(value, lazy._lazy_view)

    def data_for(self, target: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What `target.data = given` has to set, of which at least one is lazy: both are one memory for the loader from then on."""
        with self._lock:
            if isinstance(target, LazyTensor):
                return self._become(target, given)
            return self._take(given) if isinstance(given, LazyTensor) else given

    def _become(self, lazy: LazyTensor, given: torch.Tensor) -> LazyTensor:
        """Lets `lazy` stand for the elements of `given`."""
        if isinstance(given, LazyTensor):
            memory, view = given._lazy_memory, given._lazy_view
        else:
            memory, view = (
                Memory.of_real(whole_storage(given.untyped_storage(), given.dtype, given.device)),
                view_of(given),
            )
        lazy._lazy_memory, lazy._lazy_view = memory, view
        return LazyTensor(self, memory, view)

    def _take(self, lazy: LazyTensor) -> torch.Tensor:
        """Memory for a tensor of the loader's whose elements are those of `lazy`, filled later if it can be.

        Whoever needs the elements of `lazy` again gets what the loader made of them.
        """
        memory, view = lazy._lazy_memory, lazy._lazy_view
        if memory.value is None and memory.has_taken(view):
            return seen(memory.backing, view)
        if memory.value is None and not view.repeats and self.record(seen(memory.backing, view), lazy):
            memory.taken.append(view)
            return seen(memory.backing, view)
        return self.real(lazy, is_written=True)

    def make_early(self, copies: Sequence[RecordedCopy]) -> None:
        """Makes copies now that were only written down."""
        waiting = defaultdict(list)
        for copy in copies:
            # Before any is made: an operation on real memory comes here, too, and would make its neighbours.
            self.pending.remove(copy)
            waiting[copy.piece.place.tensor].append(copy)
        for names in self._whole.batches(list(waiting), batch_bytes=_BATCH_BYTES):
            values = self._whole.read(names)
            for name in names:
                self.early[name] = None
                for copy in waiting[name]:
                    target_of(copy).copy_(seen(values[name], copy.source))

    def record(self, target: torch.Tensor, lazy: LazyTensor) -> bool:
        """Writes down that `lazy` is copied into `target`; False when that cannot be written down."""
        memory = lazy._lazy_memory
        if self._is_over or not self._may_record or not is_plain(target) or not memory.is_castable(target.dtype):
            return False
        if self._exposed and self._is_exposed(target.untyped_storage()):
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

    def _is_exposed(self, storage: torch.UntypedStorage) -> bool:
        """Whether any of its bytes may be seen, and written to, past torch."""
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(
            first < stop and start < first + num_bytes and not other.expired()
            for first, exposed in self._exposed.items()
            for other, num_bytes in exposed
        )

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
            return lazy_view(lazy, func, args, kwargs)
        if kind is OperationKind.SHAPE_ONLY:
            return func(*shadows(args), **{**kwargs, "device": kwargs.get("device") or lazy.device})
        if kind is OperationKind.QUESTION:
            return len(lazies) == 2
        if kind is OperationKind.DUPLICATE:
            return duplicate(lazy, func, args, kwargs)
        if kind is OperationKind.JOIN and len(lazies) == len(args[0]):
            return join(lazies, func, args, kwargs)
        if kind is OperationKind.COPY_INTO and not isinstance(args[0], LazyTensor):
            if args[0].is_meta:
                return func(args[0], lazy._lazy_shadow)
            return args[0] if self.record(args[0], lazy) else None
        if kind is OperationKind.RESHAPES_IN_PLACE and isinstance(args[0], LazyTensor):
            return reshape_in_place(args[0], func, args, kwargs)
        return None

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
        if (
            self.pending
            and not self._is_over
            and kind not in (OperationKind.VIEW, OperationKind.SHAPE_ONLY, OperationKind.QUESTION)
        ):
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
        and is_direct(tensor)
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
