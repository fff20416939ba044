"""Which tensors does a rank get, and when is one complete? Allocated before the first read, bytes counted down to zero."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.device.base import Copy, Result
from ray_streamer.device.caller_memory import (
    refuse_modes,
    refuse_overlaps,
    refuse_unwritable,
    without_tied_names,
    writable_alias,
)
from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ray_streamer.device.base import Device
    from ray_streamer.dtypes import DType
    from ray_streamer.planning.rank_plan import Piece, RankPlan
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.sharding.slices import TensorSlice

    OnComplete = Callable[[str, torch.Tensor], None]


class Results:
    """The tensors of one rank while they fill; safe to call from many threads.

    Args:
        plan: The whole plan.
        rank_plan: This rank's part of it.
        device: Where tensors are made.
        out: Tensors of the caller by name, filled in place; the rest is allocated. Names that the rank does not hold are
            refused, as are wrong shapes and dtypes.
        on_complete: Called once for each tensor when its last byte is delivered, from the thread that delivered it.

    Raises:
        DeviceError: `out` does not fit; names the tensor, expected and got.
    """

    def __init__(
        self,
        plan: ReadPlan,
        rank_plan: RankPlan,
        device: Device,
        *,
        out: Mapping[str, torch.Tensor] | None = None,
        on_complete: OnComplete | None = None,
    ) -> None:
        self._plan = plan
        self._rank = rank_plan.rank
        self._device = device
        self._on_complete = on_complete
        self._lock = threading.Lock()
        table = self._table = plan.results
        self._names, self._result_ids = table.names, table.result_ids.tolist()
        # By result: bytes to come, and one of the tensors that land there, which tells shape and dtype.
        self._missing: dict[int, int] = {}
        self._examples: dict[int, int] = {}
        for tensor in range(len(plan.index)):
            if plan.slice_of(tensor, self._rank) is not None:
                number = self._result_ids[tensor]
                self._missing[number] = self._missing.get(number, 0) + int(rank_plan.tensor_bytes[tensor])
                self._examples.setdefault(number, tensor)
        self._results: dict[int, Result] = {}
        self.delivered_bytes = 0
        self._take_out(out or {})
        # All before the first read, and in the caller's thread: memory that is not there is found missing at once, and
        # threads that allocate one by one get in each other's way in the kernel.
        self._results |= {
            number: self._allocate(tensor) for number, tensor in self._examples.items() if number not in self._results
        }
        self._zero_padding()
        device.follow_caller()

    def _take_out(self, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        refuse_modes()
        for name, given in out.items():
            refuse_unwritable(name, given)
        held = {self._names[number]: number for number in self._missing}
        out = without_tied_names(out, held, rank=self._rank)
        for name, given in out.items():
            tensor = self._examples[held[name]]
            dtype = self._dtype_of(tensor)
            expected = (self._result_shape(tensor), getattr(torch, dtype.torch_name))
            if (tuple(given.shape), given.dtype) != expected:
                raise DeviceError(
                    f"out[{name!r}] on rank {self._rank} must have shape {expected[0]} and dtype {expected[1]}, "
                    f"got {tuple(given.shape)} and {given.dtype}"
                )
            self._device.check_target(name, given)
        refuse_overlaps(out)
        self._results |= {held[name]: self._device.result(given) for name, given in out.items()}

    def _slice_of(self, tensor: int) -> TensorSlice:
        tensor_slice = self._plan.slice_of(tensor, self._rank)
        assert tensor_slice is not None
        return tensor_slice

    def _result_shape(self, tensor: int) -> tuple[int, ...]:
        return self._dtype_of(tensor).torch_shape(self._slice_of(tensor).shape)

    def _allocate(self, tensor: int) -> Result:
        return self._device.result(self._device.empty(self._dtype_of(tensor), self._slice_of(tensor).shape))

    def _zero_padding(self) -> None:
        """Zeroes what no box of a slice fills, as it is with a padded vocabulary; results of several tensors have no such."""
        import torch

        table = self._plan.slices
        held = [pattern[self._rank] for pattern in table.patterns]
        padded = [at for at, part in enumerate(held) if part is not None and part.reach != part.shape]
        num_members = np.bincount(self._table.result_ids)
        is_alone = num_members[self._table.result_ids] == 1
        for tensor in np.flatnonzero(np.isin(table.pattern_ids, padded) & is_alone).tolist():
            reach = self._dtype_of(tensor).torch_shape(self._slice_of(tensor).reach)
            target = writable_alias(self.result(tensor).tensor)
            for dim, (filled, size) in enumerate(zip(reach, tuple(target.shape), strict=True)):
                padding = target.narrow(dim, filled, size - filled)
                # Torch fills no packed dtype, but any bytes.
                (padding.view(torch.uint8) if padding.itemsize == 1 else padding).zero_()

    def _dtype_of(self, tensor: int) -> DType:
        return self._table.dtype_of(self._plan.index, tensor)

    @property
    def device(self) -> torch.device:
        """Where the results lie; the host when there are none."""
        import torch

        return next((result.tensor.device for result in self._results.values()), torch.device("cpu"))

    def is_cast(self, tensor: int) -> bool:
        """Whether the tensor's elements are cast on their way into their result."""
        return self._result_ids[tensor] in self._table.casts

    def stored_dtype(self, tensor: int) -> torch.dtype:
        """The dtype of the tensor's elements in the checkpoint."""
        import torch

        return getattr(torch, self._plan.index.dtype_of(tensor).torch_name)

    def result(self, tensor: int) -> Result:
        """The result in which the tensor at position `tensor` of the index lands."""
        return self._results[self._result_ids[tensor]]

    def copies(self, pieces: list[Piece]) -> list[Copy]:
        """`pieces` with the results that they go to."""
        return [Copy(piece, self.result(piece.tensor)) for piece in pieces]

    def complete_empty(self) -> None:
        """Completes the results that have no bytes."""
        for number in [number for number, num_bytes in self._missing.items() if num_bytes == 0]:
            self._complete(number)

    def settle(self, pieces: list[Piece]) -> None:
        """Counts delivered pieces; completes the results whose last byte was among them."""
        completed: list[int] = []
        with self._lock:
            for piece in pieces:
                number = self._result_ids[piece.tensor]
                self._missing[number] -= piece.num_bytes
                self.delivered_bytes += piece.num_bytes
                if self._missing[number] == 0:
                    completed.append(number)
        for number in completed:
            self._complete(number)

    def _complete(self, number: int) -> None:
        if self._on_complete is not None:
            self._on_complete(self._names[number], self._results[number].tensor)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All results by name, in the order of the index; call it when nothing is missing."""
        unfinished = [self._names[number] for number, num_bytes in self._missing.items() if num_bytes]
        assert not unfinished, f"tensors without all their bytes: {unfinished[:5]}"
        return {self._names[number]: self._results[number].tensor for number in self._missing}

    def forget(self) -> None:
        """Lets go of the tensors: they are the caller's now, or nobody's."""
        self._results.clear()
