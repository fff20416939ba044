"""What must a slice of a tensor hold? Cut by safetensors itself out of the file, or as bytes where it cannot cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open

from ray_streamer.dtypes import dtype_named

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.sharding.slices import TensorSlice


def expected_bytes(folder: Path, index: CheckpointIndex, tensor: int, held: TensorSlice) -> bytes:
    """The bytes of one rank's slice of the tensor at position `tensor`, from the files in `folder`."""
    dtype, path = index.dtype_of(tensor), folder / index.files[index.file_ids[tensor]].path
    # Torch makes true bytes of true values when it copies them, and what a file holds may be any byte.
    if dtype.is_packed or dtype.name == "BOOL":
        extent = index.extent_of(tensor)
        return cut_bytes(path.read_bytes()[extent.start : extent.stop], dtype.name, index.shape_of(tensor), held)
    return bytes_of(cut_by_safetensors(path, index.names[tensor], held))


def cut_by_safetensors(path: Path, name: str, held: TensorSlice) -> torch.Tensor:
    """A slice as `safe_open(path).get_slice(name)` gives it, box by box."""
    with safe_open(path, "pt") as file:
        lazy = file.get_slice(name)
        if not held.shape:
            return lazy[...]
        # What no box fills is zero.
        result = torch.zeros(held.shape, dtype=lazy[tuple(slice(0, 0) for _ in held.shape)].dtype)
        for box in held.boxes:
            target = tuple(slice(land, land + size) for land, size in zip(box.lands, box.shape, strict=True))
            result[target] = lazy[tuple(map(slice, box.starts, box.stops))]
        return result


def cut_bytes(data: bytes, dtype: str, shape: tuple[int, ...], held: TensorSlice) -> bytes:
    """A slice that lies on whole bytes, whatever the dtype: its last dimension is counted in bytes."""
    num_bits = dtype_named(dtype).num_bits

    def in_bytes(indices: tuple[int, ...]) -> tuple[int, ...]:
        return (*indices[:-1], *(last * num_bits // 8 for last in indices[-1:]))

    whole = np.frombuffer(data, np.uint8).reshape(in_bytes(shape))
    result = np.zeros(in_bytes(held.shape), np.uint8)
    for box in held.boxes:
        target = tuple(
            slice(land, land + size) for land, size in zip(in_bytes(box.lands), in_bytes(box.shape), strict=True)
        )
        result[target] = whole[tuple(map(slice, in_bytes(box.starts), in_bytes(box.stops)))]
    return result.tobytes()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The content of a contiguous tensor, wherever it is."""
    return memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy()).tobytes() if tensor.numel() else b""
