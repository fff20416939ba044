"""What must a device be able to do? The seam between staged bytes and tensors.

Copies may be asynchronous: `deliver` returns when they are queued and calls `done` when the source may be reused. The CPU
device does both at once; a device with copy engines calls `done` from its own thread when an event has fired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ray_streamer.dtypes import DType
    from ray_streamer.extent import Extent
    from ray_streamer.planning.rank_plan import Piece

    Done = Callable[[BaseException | None], None]


class Result(NamedTuple):
    """One tensor of a rank.

    Attributes:
        tensor: What the caller gets.
        num_bytes: From the first byte of its memory to one past the last.
        address: Of its first byte in this process, where copies of the host land; None when only the device reaches it.
    """

    tensor: torch.Tensor
    num_bytes: int
    address: int | None

    def host_bytes(self) -> NDArray[np.uint8]:
        """Its memory, where reads may land; only where the host reaches it. Made anew by each call, which costs some microseconds."""
        import torch

        first = self.tensor.storage_offset() * self.tensor.itemsize
        raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(self.tensor.detach().untyped_storage())
        return raw[first : first + self.num_bytes].numpy()

    def storage_view(self, dtype: torch.dtype) -> torch.Tensor:
        """All of its memory as a flat tensor of `dtype` that in-place operations may write."""
        from ray_streamer.device.caller_memory import writable_alias

        memory = writable_alias(self.tensor)
        flat = memory.as_strided((self.num_bytes // memory.itemsize,), (1,), memory.storage_offset())
        return flat if flat.dtype == dtype else flat.view(dtype)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first of a tensor's memory to one past the last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def address_of(memory: NDArray[Any]) -> int:
    """Where an array's first byte lies."""
    return memory.__array_interface__["data"][0]


class Copy(NamedTuple):
    """One piece and the result that it goes to."""

    piece: Piece
    target: Result


class Device(Protocol):
    """Where the tensors of one rank live; safe to call from many threads.

    Attributes:
        name: How messages name it.
        wants_staging: Whether copies out of a pinned arena are so much faster than copies out of a mapping that files in the
            page cache are read into the arena, too.
        reads_files: Whether `read_file` may be called.
    """

    name: str
    wants_staging: bool
    reads_files: bool

    def empty(self, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor of `shape` logical elements whose content is undefined."""
        ...

    def result(self, tensor: torch.Tensor) -> Result:
        """`tensor`, made by `empty` or given by the caller, prepared for copies."""
        ...

    def check_target(self, name: str, tensor: torch.Tensor) -> None:
        """Refuses memory of the caller that this device cannot write.

        Raises:
            DeviceError: Wrong device, or read-only.
        """
        ...

    def wait_for_caller_stream(self) -> None:
        """Orders all later copies behind what the calling thread has given the device to do.

        Called when the results are prepared, by the thread that asked for the load: their memory may be in use until then.
        """
        ...

    def landing(self, result: Result, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Bytes `start` to `stop` of a result, where a read may land directly; None when only copies reach it."""
        ...

    def read_file(self, file_name: str, extent: Extent, result: Result, target_start: int) -> None:
        """Reads an extent of a local file into a result, from byte `target_start` of it, past the host's memory.

        Raises:
            ShortReadError: The file ends before the extent does.
            DeviceError: The device cannot read it.
        """
        ...

    def pin(self, memory: memoryview) -> None:
        """Prepares staging memory, one's own or a neighbour's, for copies; called once for each arena before its use.

        The memory must stay mapped until `close`.
        """
        ...

    def deliver(self, source: NDArray[np.uint8], copies: Sequence[Copy], done: Done) -> None:
        """Copies pieces of one block to their tensors.

        Args:
            source: The block's bytes; must stay as they are until `done` is called.
            copies: Pieces of that block and their tensors.
            done: Called exactly once, with the error if a copy failed, from any thread.
        """
        ...

    def close(self) -> None:
        """Waits for copies under way and gives back what `pin` took; the device may serve another load."""
        ...


def check_out(name: str, tensor: torch.Tensor, *, is_here: bool, device_name: str) -> None:
    """Refuses a tensor of the caller's that is elsewhere.

    Raises:
        DeviceError: Names the tensor.
    """
    if not is_here:
        raise DeviceError(f"out[{name!r}] lies on {tensor.device}, the load was asked to deliver to {device_name}")
