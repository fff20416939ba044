"""Which tensors must be read whole while the loader runs, because it does with their values what cannot be planned?

Values are read through the caller's reader, a tensor at a time or many, and shared for as long as anybody has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from ray_streamer.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.checkpoint import CheckpointIndex

Reader = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
"""Reads tensors of the checkpoint whole: names -> tensors of the checkpoint's dtypes and shapes, in any memory. They are never
written to, and may be views of memory that ranks share; they are let go when the loader lets its own go."""


class WholeTensors:
    """Tensors read for this rank's loader.

    Attributes:
        num_bytes: Read through the reader, by tensor; a tensor that was let go and needed again counts twice.
    """

    def __init__(self, index: CheckpointIndex, reader: Reader) -> None:
        self._index, self._reader = index, reader
        self._alive: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self.num_bytes: dict[str, int] = {}

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of those names, contiguous.

        Raises:
            CaptureError: The reader gave another tensor than asked for.
        """
        found = {name: tensor for name in names if (tensor := self._alive.get(name)) is not None}
        missing = [name for name in dict.fromkeys(names) if name not in found]
        given = self._reader(missing) if missing else {}
        for name in missing:
            tensor = self._checked(name, given.get(name))
            self._alive[name] = found[name] = tensor
            extent = self._index.extent_of(self._index.position(name))
            self.num_bytes[name] = self.num_bytes.get(name, 0) + extent.stop - extent.start
        return found

    def batches(self, names: Sequence[str], *, batch_bytes: int) -> Iterator[list[str]]:
        """Names in their order, each batch of no more than `batch_bytes` or of a single tensor."""
        batch: list[str] = []
        room = batch_bytes
        for name in dict.fromkeys(names):
            extent = self._index.extent_of(self._index.position(name))
            size = extent.stop - extent.start
            if batch and size > room:
                yield batch
                batch, room = [], batch_bytes
            batch.append(name)
            room -= size
        if batch:
            yield batch

    def _checked(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor:
        position = self._index.position(name)
        stored = self._index.dtype_of(position)
        shape, dtype = stored.torch_shape(self._index.shape_of(position)), getattr(torch, stored.torch_name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            given = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CaptureError(f"the reader was asked for tensor {name!r}, {dtype} of shape {shape}, and gave {given}")
        return tensor.contiguous()
