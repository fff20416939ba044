"""What must a slice of a tensor hold? Cut by safetensors itself out of the file, or as bytes where it cannot cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.dtypes import DType
    from ray_streamer.slices import RankSlices
    from ray_streamer.slices.result import ResultForm


def expected_results(folder: Path, index: CheckpointIndex, slices: RankSlices) -> dict[str, torch.Tensor]:
    """The results of one rank, from the files in `folder`: torch's own copies of views of what safetensors reads.

    What no move fills is zero. Elements that torch would change on the way, or cannot copy one by one, are copied as bits.
    """

    def read(tensor: int) -> torch.Tensor:
        path = folder / index.files[index.file_ids[tensor]].path
        if _is_bits(index.dtype_of(tensor)):
            extent = index.extent_of(tensor)
            return _as_bits(path.read_bytes()[extent.start : extent.stop], index.dtype_of(tensor))
        with safe_open(path, "pt") as file:
            return file.get_tensor(index.names[tensor]).reshape(-1)

    return landed(slices, read)


def landed(slices: RankSlices, elements_of: Callable[[int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results that the moves of `slices` make; what none of them fills is zero.

    Args:
        slices: What a rank says.
        elements_of: Position of a tensor in the index -> its elements in a row; of dtypes that torch would change, or cannot
            copy, a row of bits for each element.
    """
    memories = [_memory(form) for form in map(slices.results.form_of, range(len(slices.results)))]
    columns = (slices.tensor_ids, slices.result_ids, slices.pattern_ids, slices.target_offsets)
    for tensor, result, pattern, offset in zip(*(column.tolist() for column in columns), strict=True):
        source, target = elements_of(tensor), memories[result]
        for move in slices.patterns[pattern]:
            inner, steps = tuple(target.shape[1:]), (1,) * (target.ndim - 1)
            width = target.shape[1] if target.ndim > 1 else 1
            views = [
                memory.as_strided(
                    (*move.shape, *inner), (*(step * width for step in side.strides), *steps), first * width
                )
                for memory, side, first in (
                    (source, move.source, move.source.offset),
                    (target, move.target, move.target.offset + offset),
                )
            ]
            views[1].copy_(views[0])
    return {spec.name: _as_result(memory, spec) for spec, memory in zip(slices.results, memories, strict=True)}


def _is_bits(dtype: DType) -> bool:
    # Torch makes true bytes of true values when it copies them, and what a file holds may be any byte.
    return dtype.is_packed or dtype.name == "BOOL"


def _memory(form: ResultForm) -> torch.Tensor:
    if _is_bits(form.stored):
        return torch.zeros(form.num_storage_elements, form.stored.num_bits, dtype=torch.uint8)
    return torch.zeros(form.num_storage_elements, dtype=getattr(torch, form.stored.torch_name))


def _as_bits(data: bytes, dtype: DType) -> torch.Tensor:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return torch.from_numpy(bits.reshape(-1, dtype.num_bits))


def _as_result(memory: torch.Tensor, form: ResultForm) -> torch.Tensor:
    if not _is_bits(form.stored):
        return memory.as_strided(form.shape, form.memory_strides)
    packed = torch.from_numpy(np.packbits(memory.numpy().reshape(-1), bitorder="little"))
    return packed.view(getattr(torch, form.stored.torch_name)).reshape(form.stored.torch_shape(form.shape))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The content of a contiguous tensor, wherever it is."""
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
