"""How is a loader captured? It runs once with lazy tensors; what it copies where is written down, and read afterwards by a plan.

recording = Capture(index, reader)
with recording:
    model.load_weights(recording.tensors())
slices, out = recording.slices(dict(model.named_parameters()))
"""

from __future__ import annotations

import threading
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,  # pyright: ignore[reportPrivateUsage]  # torch offers it under a private name only
)

from ray_streamer.capture.lazy import RAW_ACCESS, LazyTensor
from ray_streamer.capture.recorder import OperationRecorder
from ray_streamer.capture.report import CaptureReport, Group
from ray_streamer.capture.results import NAMES_OF_DTYPES, slices_of
from ray_streamer.capture.whole_tensors import WholeTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from ray_streamer.capture.whole_tensors import Reader
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.slices import RankSlices


class Capture:
    """One dry run of a rank's loader, and of the threads that it starts.

    Of a thread that was there before, it is not seen what is done to real memory without a tensor of the checkpoint.

    After the `with` block nothing may use the captured targets until their slices were loaded: what the loader copied is
    written down, and their memory is as it was before.

    Args:
        index: Of the checkpoint.
        reader: Reads tensors whole when their values are needed.

    Raises:
        CaptureError: Inside of the `with` block, from the loader's operations: one that no lazy tensor can follow, or a reader
            that gave another tensor than asked for. Errors of the reader come as they are.
    """

    def __init__(self, index: CheckpointIndex, reader: Reader) -> None:
        self._index = index
        self._whole = WholeTensors(index, reader)
        self._recorder = OperationRecorder(self._whole)
        self._modes = (_Operations(self._recorder), _RawAccess(self._recorder))
        self._given: dict[str, None] = {}

    def __enter__(self) -> Self:
        """Watches the operations of this thread, and of those that it starts."""
        _watch_threads()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)
        self._recorder.end()

    def tensor(self, name: str) -> torch.Tensor:
        """The checkpoint's tensor of that name, lazy; a new one each time, since loaders set attributes of theirs.

        Raises:
            KeyError: There is no such tensor.
        """
        position = self._index.position(name)
        stored = self._index.dtype_of(position)
        dtype = getattr(torch, stored.torch_name)
        self._given[name] = None
        shape = stored.torch_shape(self._index.shape_of(position))
        return self._recorder.lazy(name, shape, dtype, is_plannable=NAMES_OF_DTYPES.get(dtype) == stored.name)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and lazy tensor, as loaders take them: of `names`, or of all tensors in the order of their bytes."""
        for name in self._index.names if names is None else names:
            yield name, self.tensor(name)

    def slices(self, targets: Mapping[str, torch.Tensor]) -> tuple[RankSlices, dict[str, torch.Tensor]]:
        """What the loader copied, as slices, and the memory of each result; results without slices are left out.

        Args:
            targets: Parameters and buffers by name, as they are after the loader; where several share memory, the first
                name is the result's.

        Raises:
            CaptureError: A target is a lazy tensor.
        """
        return slices_of(self._index, self._recorder.pending, targets)

    @property
    def report(self) -> CaptureReport:
        """What became of each tensor that was given out so far."""
        planned: dict[str, int] = {}
        cast: dict[str, int] = {}
        for copy in self._recorder.pending:
            place = copy.piece.place
            taken = cast if place.dtype != copy.dtype else planned
            num_bytes = prod(loop.size for loop in copy.piece.loops if loop.step) * place.dtype.itemsize
            taken[place.tensor] = taken.get(place.tensor, 0) + num_bytes
        early = {name: self._whole.num_bytes.get(name, 0) for name in self._recorder.early}
        whole = {name: self._whole.num_bytes.get(name, 0) for name in self._recorder.reasons}
        used = planned.keys() | cast.keys() | early.keys() | whole.keys()
        return CaptureReport(
            planned=_group(planned),
            cast=_group(cast),
            early=_group(early),
            whole=_group(whole),
            reasons=dict(self._recorder.reasons),
            unused=_group({name: self._num_bytes(name) for name in self._given if name not in used}),
        )

    def _num_bytes(self, name: str) -> int:
        extent = self._index.extent_of(self._index.position(name))
        return extent.stop - extent.start


_REACHES_MEMORY = ("__array__", "__deepcopy__", "__reduce_ex__", "share_memory_")
"""Methods of real tensors that do so too, some by calling those, which nobody sees then."""


class _Operations(TorchDispatchMode):
    """Every operation of the thread, on whatever memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # No loader is compiled, and torch would guard against that at each operation.
        return False

    def __init__(self, recorder: OperationRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.recorder.run(func, args, kwargs or {}, is_watched=True)


class _RawAccess(TorchFunctionMode):
    """What reaches a tensor's memory past the dispatcher: it is filled before."""

    _SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
    _RAW = frozenset(getattr(torch.Tensor, name) for name in (*RAW_ACCESS, *_REACHES_MEMORY))

    def __init__(self, recorder: OperationRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == self._SET_DATA:
            if any(isinstance(tensor, LazyTensor) for tensor in args):
                args = (args[0], self._recorder.data_for(*args))
        elif func in self._RAW:
            self._recorder.expose(args[0])
        return func(*args, **kwargs) if kwargs else func(*args)


@cache
def _watch_threads() -> None:
    """From now on, threads that a watched thread starts are watched, too."""
    start = threading.Thread.start

    def watched_start(self: threading.Thread) -> None:
        mode = _get_current_dispatch_mode()
        if isinstance(mode, _Operations) and not mode.recorder.is_at_work:
            self.run = partial(_run_watched, mode.recorder, self.run)
        start(self)

    threading.Thread.start = watched_start


def _run_watched(recorder: OperationRecorder, run: Callable[[], None]) -> None:
    with _Operations(recorder), _RawAccess(recorder):
        run()


def _group(taken: dict[str, int]) -> Group:
    return Group(num_bytes=sum(taken.values()), names=tuple(taken))
