"""How do runs too short for the copy engine reach the device? Packed on the host, or cut on the device out of whole rows.

    packed     rows of the block ── numpy ──> a page-locked chunk ── one contiguous copy ──> tensor
    cut        all bytes between first and last run ── contiguous copy ──> scratch on the device ── strided copy ──> tensor

A strided copy out of host memory fetches each run by itself, and below some length the time goes into fetching. Packing costs
the processor one pass over the wanted bytes and 4 MiB of page-locked memory beside the arena. Cutting costs no processor time,
but every byte between the runs crosses the bus, and device memory: it happens only where a scratch was allowed.
"""

from __future__ import annotations

import mmap
import queue
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_streamer.device.base import address_of
from ray_streamer.errors import DeviceError
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ray_streamer.device.cuda_runtime import CudaRuntime
    from ray_streamer.device.page_locks import PageLocks
    from ray_streamer.planning.rank_plan import Piece

CHUNK_BYTES = 1 << 20
NUM_CHUNKS = 4


class HostBounce:
    """Page-locked chunks in which pieces are packed; mapped when the first is needed.

    Args:
        runtime: Of the device that copies.
        locks: Locks the chunks, and unlocks them when it is closed.
        after: Calls back when an event has fired, from another thread.
    """

    def __init__(
        self, runtime: CudaRuntime, locks: PageLocks, after: Callable[[int, Callable[[], None]], None]
    ) -> None:
        self._runtime, self._locks, self._after = runtime, locks, after
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._idle: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()

    def copy(self, source: NDArray[np.uint8], piece: Piece, target: int) -> None:
        """Packs a piece whose runs lie side by side at the address `target`, and queues the copies; waits for idle chunks."""
        self._map()
        rows = piece.rows_of(source)
        rows_per_chunk = CHUNK_BYTES // piece.run_bytes
        for first in range(0, piece.num_runs, rows_per_chunk):
            some = rows[first : first + rows_per_chunk]
            chunk = self._idle.get()
            try:
                np.copyto(chunk[: some.size].reshape(some.shape), some)
                self._runtime.copy(target + first * piece.run_bytes, address_of(chunk), some.size)
                self._after(self._runtime.record(), lambda chunk=chunk: self._idle.put(chunk))
            except BaseException:
                self._idle.put(chunk)  # for those that wait; the load is over
                raise

    def _map(self) -> None:
        with self._lock:
            if self._memory is None:
                self._memory = mmap.mmap(-1, NUM_CHUNKS * CHUNK_BYTES)
                self._locks.lock(memoryview(self._memory))
                whole = np.frombuffer(self._memory, np.uint8)
                self._locks.wait_for(address_of(whole))
                for chunk in whole.reshape(NUM_CHUNKS, CHUNK_BYTES):
                    self._idle.put(chunk)


class DeviceScratch:
    """Device memory in which whole rows are cut; allocated when the first piece needs it.

    One stream does everything in order, so the next rows may overwrite what the last cut was made from.

    Args:
        runtime: Of the device.
        num_bytes: Its size; 0 = there is none.
    """

    def __init__(self, runtime: CudaRuntime, num_bytes: int) -> None:
        self._runtime = runtime
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        self._memory: torch.Tensor | None = None

    def allocate(self) -> None:
        """Takes the memory, for work that is queued after the caller's.

        Raises:
            DeviceError: The device has no room for it.
        """
        if not self.num_bytes:
            return
        try:
            self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._runtime.torch_device)
        except RuntimeError as error:
            raise DeviceError(
                f"{self._runtime.name} has no room for a scratch of {human_bytes(self.num_bytes)}: {error}; "
                "lower device_scratch_bytes"
            ) from error

    def takes(self, piece: Piece) -> bool:
        """Whether at least one row fits."""
        return self.num_bytes >= max(piece.source_stride, 1) and self._memory is not None

    def copy(self, source: int, piece: Piece, target: int) -> None:
        """Queues a piece whose first run is at the addresses `source` and `target`."""
        assert self._memory is not None
        scratch = self._memory.data_ptr()
        rows_at_once = self.num_bytes // piece.source_stride
        for first in range(0, piece.num_runs, rows_at_once):
            num_runs = min(rows_at_once, piece.num_runs - first)
            span = (num_runs - 1) * piece.source_stride + piece.run_bytes
            with self._lock:
                self._runtime.copy(scratch, source + first * piece.source_stride, span)
                self._runtime.cut_rows(
                    target + first * piece.target_stride,
                    piece.target_stride,
                    scratch,
                    piece.source_stride,
                    piece.run_bytes,
                    num_runs,
                )

    def close(self) -> None:
        """Gives the memory back; nothing may be under way."""
        self._memory = None
