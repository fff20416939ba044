"""Which tensors does a rank get, and when is one complete? Allocated before the first read, bytes counted down to zero."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.collector import collector_paused
from ray_streamer.device.base import Copy, Result
from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from ray_streamer.device.base import Device
    from ray_streamer.planning.coverage import Hole
    from ray_streamer.planning.rank_plan import Piece, RankPlan
    from ray_streamer.slices.result import ResultForm

    OnComplete = Callable[[list[tuple[str, torch.Tensor]]], None]


class Results:
    """The tensors of one rank while they fill; safe to call from many threads.

    Args:
        plan: What this rank does.
        device: Where tensors are made.
        out: Tensors of the caller by name, filled in place; the rest is allocated. Names that the rank does not hold are
            refused, as are wrong shapes, strides and dtypes. One that has strides in the plan may be given flat.
        on_complete: Called with names and tensors whose last bytes were delivered together, from the thread that delivered them;
            once for each tensor.

    Raises:
        DeviceError: `out` does not fit, or lacks a result of given strides; names the tensor, expected and got.
    """

    def __init__(
        self,
        plan: RankPlan,
        device: Device,
        *,
        out: Mapping[str, torch.Tensor] | None = None,
        on_complete: OnComplete | None = None,
    ) -> None:
        self._specs = plan.results
        self._rank = plan.rank
        self._device = device
        self._on_complete = on_complete
        self._lock = threading.Lock()
        self._missing: list[int] = plan.bytes_to_fill.tolist()
        given = self._given(out or {})
        # All before the first read, and in the caller's thread: memory that is not there is found missing at once, and
        # threads that allocate one by one get in each other's way in the kernel.
        with collector_paused():
            self._results = [
                device.result(given[name]) if name in given else self._allocate(name, self._specs.forms[form])
                for name, form in zip(self._specs.names, self._specs.form_ids.tolist(), strict=True)
            ]
        self._zero_holes(plan)
        device.wait_for_caller_stream()

    def _given(self, out: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the caller, checked."""
        from ray_streamer.device import caller_memory

        caller_memory.refuse_modes()
        if not out:
            return {}
        for name, tensor in out.items():
            caller_memory.refuse_unwritable(name, tensor)
        numbers = {name: number for number, name in enumerate(self._specs.names)}
        given = caller_memory.without_tied_names(out, numbers, rank=self._rank)
        for name, tensor in given.items():
            self._check_fit(name, tensor, self._specs.form_of(numbers[name]))
            self._device.check_target(name, tensor)
        caller_memory.refuse_overlaps(given)
        return given

    def _check_fit(self, name: str, tensor: torch.Tensor, form: ResultForm) -> None:
        import torch

        shape, dtype = form.stored.torch_shape(form.shape), getattr(torch, form.stored.torch_name)
        is_flat = form.strides is not None and tuple(tensor.shape) == (form.num_storage_elements,)
        if (tuple(tensor.shape) != shape and not is_flat) or tensor.dtype != dtype:
            raise DeviceError(
                f"out[{name!r}] on rank {self._rank} must have shape {shape} and dtype {dtype}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype}"
            )
        if is_flat or form.strides is None:
            if not tensor.is_contiguous():
                raise DeviceError(
                    f"out[{name!r}] has strides {tensor.stride()} for shape {tuple(tensor.shape)}, in which its elements cannot "
                    "be placed one by one; give a contiguous tensor"
                )
            return
        # Strides of dimensions of one index say nothing.
        steps = zip(shape, form.strides, tensor.stride(), strict=True)
        if any(size > 1 and stride != got for size, stride, got in steps):
            raise DeviceError(
                f"out[{name!r}] on rank {self._rank} must have strides {form.strides}, got {tensor.stride()}"
            )

    def _allocate(self, name: str, form: ResultForm) -> Result:
        if form.strides is not None:
            raise DeviceError(
                f"result {name!r} of rank {self._rank} has strides {form.strides}, which only a tensor of the caller's has; "
                "give it in out"
            )
        return self._device.result(self._device.empty(form.stored, form.shape))

    def _zero_holes(self, plan: RankPlan) -> None:
        """Zeroes what no move fills, as it is with a padded vocabulary."""
        for some in plan.holes:
            for number in some.results.tolist():
                is_packed = self._specs.form_of(number).stored.num_bits % 8 != 0
                for hole in some.holes:
                    _zero(self._results[number], hole, is_packed=is_packed)

    @property
    def device(self) -> torch.device:
        """Where the results lie; the host when there are none."""
        import torch

        return self._results[0].tensor.device if self._results else torch.device("cpu")

    def result(self, number: int) -> Result:
        """The result at position `number` of the plan's."""
        return self._results[number]

    def copies(self, pieces: Iterable[Piece]) -> list[Copy]:
        """`pieces` with the results that they go to."""
        return [Copy(piece, self._results[piece.result]) for piece in pieces]

    def complete_empty(self) -> None:
        """Completes the results that have nothing to wait for."""
        self._complete([number for number, num_bytes in enumerate(self._missing) if num_bytes == 0])

    def count_delivered(self, delivered: Iterable[tuple[int, int]]) -> None:
        """Counts delivered bytes, as pairs of result and number; completes the results whose last byte was among them."""
        completed: list[int] = []
        with self._lock:
            for number, num_bytes in delivered:
                if not num_bytes:
                    continue
                self._missing[number] -= num_bytes
                if self._missing[number] == 0:
                    completed.append(number)
        self._complete(completed)

    def _complete(self, numbers: list[int]) -> None:
        if self._on_complete is not None and numbers:
            with collector_paused():
                completed = [(self._specs.names[number], self._results[number].tensor) for number in numbers]
            self._on_complete(completed)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All results by name, in the order of the plan; call it when nothing is missing."""
        unfinished = [name for name, num_bytes in zip(self._specs.names, self._missing, strict=True) if num_bytes]
        assert not unfinished, f"tensors without all their bytes: {unfinished[:5]}"
        return {name: result.tensor for name, result in zip(self._specs.names, self._results, strict=True)}

    def forget(self) -> None:
        """Lets go of the tensors: they are the caller's now, or nobody's."""
        self._results.clear()


def _zero(result: Result, hole: Hole, *, is_packed: bool) -> None:
    """Zeroes a hole, whose places are bytes where several elements share one, else elements."""
    import torch

    if result.address is None:
        memory = result.storage_view(torch.uint8 if is_packed else result.tensor.dtype)
        memory.as_strided(hole.shape, hole.strides, memory.storage_offset() + hole.offset).zero_()
        return
    # Not by torch: it waits for its threads, which are not there in a process forked from one that used them.
    width = 1 if is_packed else result.tensor.itemsize
    strides = (*(stride * width for stride in hole.strides), 1)
    np.ndarray((*hole.shape, width), np.uint8, result.host_bytes(), hole.offset * width, strides)[...] = 0
