"""What is one rank's part of a tensor, when is it in memory, and is it the right one? In the rank's process, without this project."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

PAGE_BYTES = 4096

Windows = dict[str, list[int] | None]
"""By tensor: the dimension that is cut, and where the rank's part starts and stops; None where the rank holds all."""

Tensors = dict[str, Any]


def cut(tensor: Any, window: list[int] | None) -> Any:
    """A rank's part of a whole tensor: a view."""
    if window is None:
        return tensor
    dim, start, stop = window
    return tensor.narrow(dim, start, stop - start)


def read_every_page(tensors: Tensors) -> int:
    """The sum of one byte of each page of every tensor: what is only mapped to a file is read from it here."""
    return sum(int(_bytes_of(tensor)[::PAGE_BYTES].sum()) for tensor in tensors.values())


def digest(tensors: Tensors) -> str:
    """Of names, dtypes, shapes and bytes.

    The bytes of each tensor by their checksum, which finds any mistake that is not made on purpose. A hash that would find those,
    too, takes as long as many a load.
    """
    state = hashlib.blake2b()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(_bytes_of(tensor).numpy())}".encode())
    return state.hexdigest()


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().view(-1).view(torch.uint8)
