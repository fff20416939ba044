"""How do bytes reach tensors of a CUDA device, or of a ROCm one? By its copy engine, while the next blocks are read.

    deliver                            ──> copies queued on a stream of our own, an event behind them
    a thread waits for the event       ──> done: the slot is free, the piece counts
    close                              ──> all copies are done, then staging memory is unlocked

What is copied how:

    contiguous                              one asynchronous copy
    rows of at least SHORT_RUN_BYTES        one strided copy: only the slice's bytes cross the bus
    shorter rows                            packed on the host, or cut on the device (see `short_runs`)

Results are counted, and handed out, when the host has seen their event: whatever stream uses them then finds all bytes there. The
other direction is `wait_for_caller_stream`: memory that torch gives out may still be in use by work that the caller has queued.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.device.base import Result, address_of, check_out, span_bytes
from ray_streamer.device.cuda_library import find_loaded_library
from ray_streamer.device.cuda_runtime import MAX_STRIDE_BYTES, CudaRuntime
from ray_streamer.device.direct_storage import DirectStorage, open_direct_storage
from ray_streamer.device.page_locks import PageLocks
from ray_streamer.device.short_runs import CHUNK_BYTES, DeviceScratch, HostBounce
from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from ray_streamer.device.base import Copy, Done
    from ray_streamer.dtypes import DType
    from ray_streamer.extent import Extent
    from ray_streamer.planning.rank_plan import Piece

SHORT_RUN_BYTES = 1024
"""Runs below this are not left to the copy engine. Provisional: to be set from what `make gpu-check` measures."""


class CudaDevice:
    """See `Device`; starts at once, in the background, and may serve one load after the other.

    Args:
        runtime: The device's.
        short_run_bytes: Runs below this are packed or cut.
        device_scratch_bytes: Device memory for cutting; 0 = short runs are packed on the host.
        direct_storage: Reads local files past the host; None = nothing does.
    """

    wants_staging = True

    def __init__(
        self,
        runtime: CudaRuntime,
        *,
        short_run_bytes: int = SHORT_RUN_BYTES,
        device_scratch_bytes: int = 0,
        direct_storage: DirectStorage | None = None,
    ) -> None:
        self._runtime = runtime
        self._short_run_bytes = min(short_run_bytes, CHUNK_BYTES)
        self._scratch = DeviceScratch(runtime, device_scratch_bytes)
        self._direct_storage = direct_storage
        self.reads_files = direct_storage is not None
        self.name = runtime.name
        self._started = _start_aside(runtime.start)
        self._begin()

    def _begin(self) -> None:
        """What one load needs; threads start when they have something to do."""
        self._finisher = ThreadPoolExecutor(1, "ray_streamer-copies-done")
        self._failed: BaseException | None = None
        self._locks = PageLocks(self._runtime)
        self._bounce = HostBounce(self._runtime, self._locks, self._after)

    def empty(self, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Device.empty`.

        Raises:
            DeviceError: The device has no room.
        """
        self._started.result()
        try:
            return torch.empty(
                dtype.torch_shape(shape), dtype=getattr(torch, dtype.torch_name), device=self._runtime.torch_device
            )
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.name} has no room for a tensor of shape {shape}, {dtype.name}: {error}"
            ) from error

    def result(self, tensor: torch.Tensor) -> Result:
        """See `Device.result`."""
        return Result(tensor, span_bytes(tensor), None)

    def check_target(self, name: str, tensor: torch.Tensor) -> None:
        """See `Device.check_target`."""
        check_out(name, tensor, is_here=tensor.device == self._runtime.torch_device, device_name=self.name)

    def wait_for_caller_stream(self) -> None:
        """See `Device.wait_for_caller_stream`."""
        self._started.result()
        self._scratch.allocate()
        self._runtime.wait_for_caller_stream()
        if self.reads_files:
            # Such reads know no stream: what the caller has queued must be over.
            _start_aside(self._runtime.drain).result()

    def landing(self, result: Result, start: int, stop: int) -> None:
        """See `Device.landing`: no read lands in device memory."""

    def read_file(self, file_name: str, extent: Extent, result: Result, target_start: int) -> None:
        """See `Device.read_file`."""
        assert self._direct_storage is not None
        tensor = result.tensor.detach()
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        first = tensor.storage_offset() * tensor.itemsize + target_start
        self._direct_storage.read(file_name, extent, raw[first : first + extent.num_bytes])

    def pin(self, memory: memoryview) -> None:
        """See `Device.pin`; returns while the memory is being page-locked."""
        self._locks.lock(memory)

    def deliver(self, source: NDArray[np.uint8], copies: Sequence[Copy], done: Done) -> None:
        """See `Device.deliver`."""
        failure: BaseException | None = None
        try:
            self._started.result()
            self._locks.wait_for(address_of(source))
            for piece, target in copies:
                self._copy(source, piece, target)
        except BaseException as error:
            failure = error
        try:
            event = self._runtime.record()
        except BaseException as error:
            done(failure or error)
        else:
            # Also after a failure: copies that were queued before it still read the source.
            self._finisher.submit(self._finish, event, done, failure)

    def _copy(self, source: NDArray[np.uint8], piece: Piece, result: Result) -> None:
        """Queues one piece."""
        check_bounds(piece, source.nbytes, result.num_bytes)
        start, target = address_of(source) + piece.source_start, result.tensor.data_ptr() + piece.target_start
        if piece.num_runs == 1 or piece.run_bytes == piece.source_stride == piece.target_stride:
            self._runtime.copy(target, start, piece.num_bytes)
        elif piece.run_bytes < self._short_run_bytes and self._scratch.takes(piece):
            self._scratch.copy(start, piece, target)
        elif piece.run_bytes < self._short_run_bytes and piece.run_bytes == piece.target_stride:
            self._bounce.copy(source, piece, target)
        elif max(piece.source_stride, piece.target_stride) > MAX_STRIDE_BYTES:
            for run in range(piece.num_runs):
                self._runtime.copy(
                    target + run * piece.target_stride, start + run * piece.source_stride, piece.run_bytes
                )
        else:
            self._runtime.copy_rows(
                target, piece.target_stride, start, piece.source_stride, piece.run_bytes, piece.num_runs
            )

    def _finish(self, event: int, done: Done, failure: BaseException | None) -> None:
        try:
            self._runtime.wait(event)
        except BaseException as error:
            # Also that of whatever is behind it: a piece may have gone through chunks with events of their own.
            self._failed = self._failed or error
        done(failure or self._failed)

    def _after(self, event: int, call: Callable[[], None]) -> None:
        self._finisher.submit(self._finish, event, lambda _: call(), None)

    def close(self) -> None:
        """See `Device.close`.

        Raises:
            DeviceError: A copy failed that nobody waited for, or memory could not be given back.
        """
        try:
            draining = self._finisher.submit(self._runtime.drain)
            self._finisher.shutdown()
            self._locks.close()
            draining.result()
        finally:
            self._scratch.close()
            if self._direct_storage is not None:
                self._direct_storage.close()
            self._begin()


def check_bounds(piece: Piece, source_bytes: int, target_bytes: int) -> None:
    """Refuses a piece that leaves its memory: on a device nobody else would notice.

    Raises:
        ValueError: Names both.
    """
    last = piece.num_runs - 1
    source_stop = piece.source_start + last * piece.source_stride + piece.run_bytes
    target_stop = piece.target_start + last * piece.target_stride + piece.run_bytes
    if min(piece) < 0 or source_stop > source_bytes or target_stop > target_bytes:
        raise ValueError(f"{piece} does not lie within a block of {source_bytes} and a tensor of {target_bytes} bytes")


def _start_aside(start: Callable[[], None]) -> Future[None]:
    """Runs `start` on a thread that ends with it."""
    thread = ThreadPoolExecutor(1, "ray_streamer-cuda-start")
    started = thread.submit(start)
    thread.shutdown(wait=False)
    return started


def open_cuda(name: str, *, gpu_direct_storage: bool = False, **options: Any) -> CudaDevice:
    """The CUDA device that `name` stands for, which begins to start.

    Args:
        name: "cuda" for the one that is torch's current device, "cuda:N" for the N-th that this process sees.
        gpu_direct_storage: Whether the device reads local files itself, where kvikio is installed.
        options: As of `CudaDevice`.

    Raises:
        DeviceError: Torch sees no such device.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = (
            "torch was built without CUDA" if built is None else "is a driver installed, and CUDA_VISIBLE_DEVICES set?"
        )
        raise DeviceError(f"device {name!r}: torch {torch.__version__} sees no CUDA device ({reason})")
    wanted = torch.device(name)
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r}: this process sees {torch.cuda.device_count()} CUDA devices, numbered from 0"
        )
    direct_storage = open_direct_storage() if gpu_direct_storage else None
    return CudaDevice(_runtime_of(index), direct_storage=direct_storage, **options)


@functools.cache
def _runtime_of(index: int) -> CudaRuntime:
    """One for the process: stream and events are made once, however many loads follow each other."""
    return CudaRuntime(find_loaded_library(), torch.device("cuda", index), index)
