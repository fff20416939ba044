"""How do the ranks' slices become the whole tensor again? Each run of bytes goes back to where it was cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import ShardingError
from ray_streamer.planning.regions import Region, regions_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from ray_streamer.dtypes import DType
    from ray_streamer.sharding.slices import TensorSlice


def assemble(
    dtype: DType, shape: tuple[int, ...], slices: Sequence[TensorSlice], parts: Sequence[bytes]
) -> torch.Tensor:
    """A tensor of `shape` logical elements from slices and their bytes; ranks that hold the same part may repeat it.

    Raises:
        ShardingError: The slices leave a part of the tensor open.
    """
    device = CpuDevice()
    tensor, host_bytes = device.result(device.empty(dtype, shape))
    assert host_bytes is not None
    is_filled = np.zeros(host_bytes.nbytes, dtype=bool)
    for tensor_slice, part in zip(slices, parts, strict=True):
        source = np.frombuffer(part, dtype=np.uint8)
        for region in regions_of(tensor_slice, shape, dtype.num_bits):
            _runs(host_bytes, region)[...] = np.ndarray(
                (region.num_runs, region.run_bytes), np.uint8, source, region.target_start, (region.target_stride, 1)
            )
            _runs(is_filled.view(np.uint8), region)[...] = 1
    if not is_filled.all():
        raise ShardingError(f"the ranks hold {int(is_filled.sum())} of the tensor's {is_filled.size} bytes")
    return tensor


def _runs(whole: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
    """The bytes of the whole tensor that a region covers, one row per run."""
    shape = (region.num_runs, region.run_bytes)
    return np.ndarray(shape, np.uint8, whole, region.source_start, (region.source_stride, 1))
