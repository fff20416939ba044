"""How do bytes reach tensors in host memory? By copies that release the interpreter lock while they move bytes, unless these are few."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_streamer.device.base import Result, address_of, check_out, span_bytes
from ray_streamer.device.first_touch import fault_in, may_write
from ray_streamer.errors import DeviceError
from ray_streamer.process_limits import limits_explained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ray_streamer.device.base import Copy, Done
    from ray_streamer.dtypes import DType
    from ray_streamer.extent import Extent
    from ray_streamer.planning.rank_plan import Piece


def _memmove_of(library: ctypes.CDLL) -> Callable[[int, int, int], object]:
    memmove = library.memmove
    memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    memmove.restype = None
    return memmove


_HELD_BYTES = 16 << 10
"""Copies up to this size keep the interpreter lock: giving it up and taking it again would take longer."""

_memmove_unlocked = _memmove_of(ctypes.CDLL(None))
_memmove_held = _memmove_of(ctypes.PyDLL(None))


class CpuDevice:
    """See `Device`; every copy is done when `deliver` returns."""

    name = "cpu"
    wants_staging = False
    reads_files = False

    def empty(self, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Device.empty`.

        Raises:
            BudgetError: The host has no room.
        """
        try:
            return torch.empty(dtype.torch_shape(shape), dtype=getattr(torch, dtype.torch_name), device="cpu")
        except (MemoryError, RuntimeError):
            with limits_explained(f"make a tensor of shape {shape}, {dtype.name}, in host memory"):
                raise

    def result(self, tensor: torch.Tensor) -> Result:
        """See `Device.result`."""
        # A single element may have any stride, and is contiguous with it.
        return Result(tensor, tensor.nbytes if tensor.is_contiguous() else span_bytes(tensor), tensor.data_ptr())

    def check_target(self, name: str, tensor: torch.Tensor) -> None:
        """See `Device.check_target`."""
        check_out(name, tensor, is_here=tensor.device.type == "cpu", device_name=self.name)
        # The last page: whether the first was touched tells `fault_in` of the rest.
        if tensor.numel() and not may_write(tensor.data_ptr() + span_bytes(tensor) - 1):
            raise DeviceError(
                f"out[{name!r}] lies in memory that is read-only, as a file mapped so; give {name}.clone()"
            )

    def wait_for_caller_stream(self) -> None:
        """See `Device.wait_for_caller_stream`; host memory is the caller's own to order."""

    def landing(self, result: Result, start: int, stop: int) -> NDArray[np.uint8]:
        """See `Device.landing`."""
        memory = result.host_bytes()[start:stop]
        fault_in(address_of(memory), memory.nbytes)
        return memory

    def read_file(self, file_name: str, extent: Extent, result: Result, target_start: int) -> None:
        """See `Device.read_file`; the storage reads into host memory."""
        raise DeviceError("host memory is read into by the storage")

    def pin(self, memory: memoryview) -> None:
        """See `Device.pin`; host memory needs nothing."""

    def deliver(self, source: NDArray[np.uint8], copies: Sequence[Copy], done: Done) -> None:
        """See `Device.deliver`."""
        try:
            address = address_of(source)
            for piece, target in copies:
                if piece.num_runs == 1:
                    copy_run(address, source.nbytes, piece, target)
                else:
                    copy_rows(source, piece, target.host_bytes())
        except BaseException as error:
            done(error)
        else:
            done(None)

    def close(self) -> None:
        """See `Device.close`; nothing is under way."""


def copy_run(source_address: int, source_bytes: int, piece: Piece, target: Result) -> None:
    """Moves a piece of one run from a block's bytes to a result.

    Raises:
        ValueError: It does not lie within both.
    """
    start, num_bytes = piece.target_start, piece.run_bytes
    if not (0 <= piece.source_start <= source_bytes - num_bytes and 0 <= start <= target.num_bytes - num_bytes):
        raise ValueError(f"{piece} leaves a block of {source_bytes} or a tensor of {target.num_bytes} bytes")
    assert target.address is not None
    to, source = target.address + start, source_address + piece.source_start
    if num_bytes <= _HELD_BYTES:
        _memmove_held(to, source, num_bytes)
        return
    fault_in(to, num_bytes)
    _memmove_unlocked(to, source, num_bytes)


def copy_rows(source: NDArray[np.uint8], piece: Piece, target: NDArray[np.uint8]) -> None:
    """Moves a piece of many runs from a block's bytes to a tensor's bytes.

    Raises:
        ValueError: It does not lie within both; slices would be cut to what is there, or repeated, in silence.
    """
    rows = piece.rows_of(source)
    written = np.ndarray(rows.shape, np.uint8, target, piece.target_start, (piece.target_stride, 1))
    fault_in(address_of(written), (piece.num_runs - 1) * piece.target_stride + piece.run_bytes)
    np.copyto(written, rows)
