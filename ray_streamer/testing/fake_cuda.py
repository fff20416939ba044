"""A CUDA runtime without a GPU: host tensors stand in for device memory, and bytes move as late as the real one allows.

Copies out of page-locked memory are queued and made only when somebody waits for an event behind them, or earlier by chance when
a `random` is given; copies out of other memory read it at once and write late, as the driver does. So memory that is reused,
unlocked or freed before its event shows as wrong bytes or as a fault. Every call is recorded; any call can be made to fail.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ray_streamer.device.cuda import CudaDevice
from ray_streamer.device.cuda_runtime import CudaRuntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from random import Random

CALLER_STREAM = 7
"""The stream on which torch would put the caller's work."""

_TEXTS = {
    1: "invalid argument",
    2: "out of memory",
    12: "invalid pitch argument",
    700: "an illegal memory access was encountered",
    712: "part or all of the requested memory range is already mapped",
    713: "pointer does not correspond to a registered memory region",
}


class Recorded(NamedTuple):
    """One call, in the order of their arrival."""

    name: str
    arguments: tuple[Any, ...]


class FakeCuda:
    """See `CudaLibrary`.

    Args:
        random: Decides how many queued copies are made before anybody waits for them; None = none.
        failures: Status of the n-th call of a function, counted from 1, by its name: `{("MemcpyAsync", 3): 700}`.
        before: What to do before a call of a function, by its name, outside of all locks; may block.

    Attributes:
        calls: All calls so far.
        faults: What a real device would have crashed on, or gone wrong silently; empty in a correct program.
        locked: Page-locked memory, start -> stop.
    """

    prefix = "cuda"

    def __init__(
        self,
        *,
        random: Random | None = None,
        failures: dict[tuple[str, int], int] | None = None,
        before: dict[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._random, self._failures, self._before = random, failures or {}, before or {}
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._queue: deque[Callable[[], None]] = deque()
        self._num_queued = 0
        self._num_made = 0
        self._events: dict[int, int] = {}
        self._num_handles = 100
        self.calls: list[Recorded] = []
        self.faults: list[str] = []
        self.locked: dict[int, int] = {}

    def call(self, name: str, *arguments: Any) -> int:
        """See `CudaLibrary.call`."""
        if name in self._before:
            self._before[name]()
        with self._lock:
            self.calls.append(Recorded(name, arguments))
            status = self._failures.get((name, self.count(name)), 0)
            if name == "SetDevice":
                self._thread.is_bound = True
            elif name != "GetLastError" and not getattr(self._thread, "is_bound", False):
                self.faults.append(f"{name} in a thread that has not chosen a device")
            return status or getattr(self, f"_{name}")(*arguments) or 0

    def error_text(self, status: int) -> str:
        """See `CudaLibrary.error_text`."""
        return _TEXTS.get(status, "unknown error")

    def caller_stream(self, device: torch.device) -> int:
        """See `CudaLibrary.caller_stream`."""
        return CALLER_STREAM

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """See `CudaLibrary.guard`."""
        self._thread.is_bound = True
        return nullcontext()

    def count(self, *names: str) -> int:
        """How often functions were called."""
        with self._lock:
            return sum(call.name in names for call in self.calls)

    @property
    def num_pending(self) -> int:
        """Copies that are queued and not made."""
        return self._num_queued - self._num_made

    def _SetDevice(self, index: int) -> None:
        pass

    def _GetLastError(self) -> None:
        pass

    def _StreamCreateWithFlags(self, handle: Any, flags: int) -> None:
        handle._obj.value = self._new_handle()

    def _EventCreateWithFlags(self, handle: Any, flags: int) -> None:
        handle._obj.value = self._new_handle()

    def _new_handle(self) -> int:
        self._num_handles += 1
        return self._num_handles

    def _StreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        pass

    def _EventRecord(self, event: int, stream: int) -> None:
        self._events[event] = self._num_queued

    def _EventSynchronize(self, event: int) -> None:
        self._make(self._events[event] - self._num_made)

    def _StreamSynchronize(self, stream: int) -> None:
        self._make(self.num_pending)

    def _HostRegister(self, address: int, num_bytes: int, flags: int) -> int | None:
        if any(start < address + num_bytes and address < stop for start, stop in self.locked.items()):
            return 712
        self.locked[address] = address + num_bytes
        return None

    def _HostUnregister(self, address: int) -> int | None:
        return None if self.locked.pop(address, None) else 713

    def _MemcpyAsync(self, target: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        self._queue_rows(target, num_bytes, source, num_bytes, num_bytes, 1, kind)

    def _Memcpy2DAsync(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, _: int
    ) -> int | None:
        if width > min(target_pitch, source_pitch):
            return 12
        self._queue_rows(target, target_pitch, source, source_pitch, width, height, kind)
        return None

    def _queue_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int
    ) -> None:
        stop = source + (height - 1) * source_pitch + width
        if kind == 1 and not self._is_locked(source, stop):
            rows = [ctypes.string_at(source + row * source_pitch, width) for row in range(height)]
            self._enqueue(lambda: _write_rows(target, target_pitch, rows))
            return

        def move() -> None:
            if kind == 1 and not self._is_locked(source, stop):
                self.faults.append("a copy out of memory that was unlocked before it")
                return
            rows = [ctypes.string_at(source + row * source_pitch, width) for row in range(height)]
            _write_rows(target, target_pitch, rows)

        self._enqueue(move)

    def _is_locked(self, start: int, stop: int) -> bool:
        return any(first <= start and stop <= last for first, last in self.locked.items())

    def _enqueue(self, move: Callable[[], None]) -> None:
        self._queue.append(move)
        self._num_queued += 1
        if self._random is not None:
            self._make(self._random.randint(0, self.num_pending))

    def _make(self, num_copies: int) -> None:
        for _ in range(num_copies):
            self._queue.popleft()()
            self._num_made += 1


def _write_rows(target: int, pitch: int, rows: list[bytes]) -> None:
    for number, row in enumerate(rows):
        ctypes.memmove(target + number * pitch, row, len(row))


def open_fake_cuda(library: FakeCuda, **options: Any) -> CudaDevice:
    """The real CUDA device, on a runtime without a GPU; its tensors are host tensors.

    Args:
        library: The fake; one for each device.
        options: As of `CudaDevice`.
    """
    return CudaDevice(CudaRuntime(library, torch.device("cpu"), 0), **options)
