"""Tensors in host memory: numpy copies, which release the interpreter lock while they move bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_streamer.device.base import Result, check_out, span_bytes
from ray_streamer.device.first_touch import fault_in
from ray_streamer.errors import DeviceError
from ray_streamer.process_limits import limits_explained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.device.base import Copy, Done
    from ray_streamer.dtypes import DType
    from ray_streamer.extent import Extent
    from ray_streamer.planning.rank_plan import Piece

_VIEWED_AS_BYTES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8}
)


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
        if tensor.dtype in _VIEWED_AS_BYTES and tensor.is_contiguous():
            # A single element may have any stride, and is contiguous with it.
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            return Result(tensor, tensor.nbytes, flat.view(torch.uint8).numpy())
        # Packed and complex dtypes have no such view, other strides no such shape.
        first = tensor.storage_offset() * tensor.itemsize
        raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.detach().untyped_storage())
        num_bytes = span_bytes(tensor)
        return Result(tensor, num_bytes, raw[first : first + num_bytes].numpy())

    def check_target(self, name: str, tensor: torch.Tensor) -> None:
        """See `Device.check_target`."""
        check_out(name, tensor, is_here=tensor.device.type == "cpu", device_name=self.name)

    def wait_for_caller_stream(self) -> None:
        """See `Device.wait_for_caller_stream`; host memory is the caller's own to order."""

    def landing(self, result: Result, start: int, stop: int) -> NDArray[np.uint8]:
        """See `Device.landing`."""
        assert result.host_bytes is not None
        memory = result.host_bytes[start:stop]
        fault_in(memory)
        return memory

    def read_file(self, file_name: str, extent: Extent, result: Result, target_start: int) -> None:
        """See `Device.read_file`; the storage reads into host memory."""
        raise DeviceError("host memory is read into by the storage")

    def pin(self, memory: memoryview) -> None:
        """See `Device.pin`; host memory needs nothing."""

    def deliver(self, source: NDArray[np.uint8], copies: Sequence[Copy], done: Done) -> None:
        """See `Device.deliver`."""
        try:
            for piece, target in copies:
                assert target.host_bytes is not None
                copy_piece(source, piece, target.host_bytes)
        except BaseException as error:
            done(error)
        else:
            done(None)

    def close(self) -> None:
        """See `Device.close`; nothing is under way."""


def copy_piece(source: NDArray[np.uint8], piece: Piece, target: NDArray[np.uint8]) -> None:
    """Moves one piece from a block's bytes to a tensor's bytes.

    Raises:
        ValueError: It does not lie within both; slices would be cut to what is there, or repeated, in silence.
    """
    target_bytes = (piece.num_runs - 1) * piece.target_stride + piece.run_bytes
    fault_in(target[piece.target_start : piece.target_start + target_bytes])
    rows = piece.rows_of(source)
    np.copyto(np.ndarray(rows.shape, np.uint8, target, piece.target_start, (piece.target_stride, 1)), rows)
