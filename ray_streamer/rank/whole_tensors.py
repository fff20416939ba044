"""How does one rank read tensors whole, by itself? Where no other rank needs them; `shared_tensors` is for all of a node.

Tensors are cut into blocks, which `concurrency` threads read straight into the tensors' memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from ray_streamer.extent import Extent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.storage.base import Storage


def read_whole(
    index: CheckpointIndex, storage: Storage, names: Sequence[str], *, block_bytes: int, concurrency: int
) -> dict[str, torch.Tensor]:
    """The tensors of those names, in host memory of their own.

    Args:
        index: Of the checkpoint.
        storage: Holds its files; stays the caller's.
        names: Of tensors, in any order.
        block_bytes: Largest storage request.
        concurrency: Reads in flight.

    Raises:
        KeyError: There is no such tensor.
        StorageError: A read failed; the others that were started are waited for.
    """
    memories = {name: torch.empty(_num_bytes(index, name), dtype=torch.uint8) for name in names}
    reads = [read for name, memory in memories.items() for read in _reads(index, name, memory, block_bytes)]
    with ThreadPoolExecutor(concurrency, thread_name_prefix="ray_streamer-whole") as threads:
        for done in [threads.submit(storage.read_into, path, at, into, etag=tag) for path, at, into, tag in reads]:
            done.result()
    return {name: _shaped(index, name, memory) for name, memory in memories.items()}


def _num_bytes(index: CheckpointIndex, name: str) -> int:
    extent = index.extent_of(index.position(name))
    return extent.stop - extent.start


def _reads(
    index: CheckpointIndex, name: str, memory: torch.Tensor, block_bytes: int
) -> Iterator[tuple[str, Extent, memoryview, str]]:
    position = index.position(name)
    file, extent = index.files[index.file_ids[position]], index.extent_of(position)
    view = memory.numpy().data
    for start in range(extent.start, extent.stop, block_bytes):
        stop = min(start + block_bytes, extent.stop)
        yield file.path, Extent(start, stop), view[start - extent.start : stop - extent.start], file.etag


def _shaped(index: CheckpointIndex, name: str, memory: torch.Tensor) -> torch.Tensor:
    position = index.position(name)
    stored = index.dtype_of(position)
    return memory.view(getattr(torch, stored.torch_name)).reshape(stored.torch_shape(index.shape_of(position)))
