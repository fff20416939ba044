"""What is asked of one CUDA device? Page-locking, copies on one stream of our own, and events that say when they are done.

Every call that fails raises, with the function's name and CUDA's own words. The stream is non-blocking: it neither waits for
the default stream nor holds it up; `wait_for_caller_stream` is the one place where it waits for somebody else's work.
"""

from __future__ import annotations

import threading
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from ray_streamer.device.cuda_library import CudaLibrary

# Equal in CUDA and HIP.
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC = 1  # the waiting thread sleeps instead of spinning
_EVENT_DISABLE_TIMING = 2
_HOST_PORTABLE = 1
_HOST_READ_ONLY = 8
_HOST_TO_DEVICE = 1
_DEVICE_TO_DEVICE = 3

MAX_STRIDE_BYTES = (1 << 31) - 1
"""Rows that lie further apart cannot be told to a strided copy (`cudaDevAttrMaxPitch`)."""


class CudaRuntime:
    """One device and a stream on it; everything but `wait_for_caller_stream` is called from this package's own threads.

    Args:
        library: Whose functions are called.
        device: Where torch puts tensors.
        index: The device's number in this process.

    Attributes:
        torch_device: As `device`.
    """

    def __init__(self, library: CudaLibrary, device: torch.device, index: int) -> None:
        self.torch_device = device
        self._library = library
        self._index = index
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._stream: int | None = None
        self._caller_event = 0
        self._idle_events: list[int] = []

    @property
    def name(self) -> str:
        """How messages name the device."""
        return f"cuda:{self._index}"

    def start(self) -> None:
        """Makes the context, which takes a while, and the stream; once."""
        with self._lock:
            if self._stream is None:
                self._caller_event = self._create("EventCreateWithFlags", _EVENT_DISABLE_TIMING)
                self._stream = self._create("StreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def lock_pages(self, address: int, num_bytes: int, *, is_read_only: bool) -> None:
        """Page-locks host memory, so that copies out of it run at full speed and behind the caller's back."""
        if is_read_only:
            try:
                self._call("HostRegister", address, num_bytes, _HOST_PORTABLE | _HOST_READ_ONLY)
            except DeviceError:
                # Not every device knows the flag; those that do not may take the memory without it.
                pass
            else:
                return
        self._call("HostRegister", address, num_bytes, _HOST_PORTABLE)

    def unlock_pages(self, address: int) -> None:
        """Gives back what `lock_pages` took."""
        self._call("HostUnregister", address)

    def wait_for_caller_stream(self) -> None:
        """Makes the copies from here on wait for what torch has given the device to do on behalf of the calling thread."""
        with self._library.guard(self.torch_device), self._lock:
            stream = self._library.caller_stream(self.torch_device)
            self._check("EventRecord", self._library.call("EventRecord", self._caller_event, stream))
            self._check("StreamWaitEvent", self._library.call("StreamWaitEvent", self._stream, self._caller_event, 0))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queues a copy of contiguous host bytes to the device; addresses."""
        self._call("MemcpyAsync", target, source, num_bytes, _HOST_TO_DEVICE, self._stream)

    def copy_rows(
        self, target: int, target_stride: int, source: int, source_stride: int, run_bytes: int, num_runs: int
    ) -> None:
        """Queues a strided copy of host bytes to the device."""
        rows = (target, target_stride, source, source_stride, run_bytes, num_runs)
        self._call("Memcpy2DAsync", *rows, _HOST_TO_DEVICE, self._stream)

    def cut_rows(
        self, target: int, target_stride: int, source: int, source_stride: int, run_bytes: int, num_runs: int
    ) -> None:
        """Queues a strided copy of bytes that are on the device."""
        rows = (target, target_stride, source, source_stride, run_bytes, num_runs)
        self._call("Memcpy2DAsync", *rows, _DEVICE_TO_DEVICE, self._stream)

    def record(self) -> int:
        """An event behind all that was queued so far; give it to `wait` once."""
        with self._lock:
            event = self._idle_events.pop() if self._idle_events else None
        if event is None:
            event = self._create("EventCreateWithFlags", _EVENT_DISABLE_TIMING | _EVENT_BLOCKING_SYNC)
        self._call("EventRecord", event, self._stream)
        return event

    def wait(self, event: int) -> None:
        """Waits until everything before `event` is done; raises what went wrong in it."""
        self._call("EventSynchronize", event)
        with self._lock:
            self._idle_events.append(event)

    def drain(self) -> None:
        """Waits for all that was queued."""
        if self._stream is not None:
            self._call("StreamSynchronize", self._stream)

    def _create(self, name: str, flags: int) -> int:
        handle = c_void_p()
        self._call(name, byref(handle), flags)
        return handle.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        if not hasattr(self._thread, "is_bound"):
            # A thread that has not chosen would put a context onto the first device.
            self._check("SetDevice", self._library.call("SetDevice", self._index))
            self._thread.is_bound = True
        self._check(name, self._library.call(name, *arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            # Taken out, or torch would find it and blame whatever it does next.
            self._library.call("GetLastError")
            text = self._library.error_text(status)
            raise DeviceError(f"{self._library.prefix}{name} on {self.name} failed: {text} (error {status})")
