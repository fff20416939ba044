"""May a load write into the tensors that the caller gives? Checked before the first read.

A tensor of the caller's may be a parameter that requires grad, an inference tensor, or one of two names of a tied weight. All of
them are plain memory, so they are written through an alias that knows nothing of autograd. What is no plain memory (DTensor,
FakeTensor, sparse, conjugated) is refused by name.
"""

from __future__ import annotations

import itertools
from math import gcd
from typing import TYPE_CHECKING

import torch

from ray_streamer.device.base import span_bytes
from ray_streamer.errors import DeviceError
from ray_streamer.planning.coverage import num_covered
from ray_streamer.planning.views import Dim, nested_views

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def writable_alias(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor` as a tensor that in-place operations may write: no gradient, no inference tensor.

    Any thread may call it, inside `torch.inference_mode()` or outside. It shares storage, offset, shape and strides.
    """
    with torch.inference_mode(False), torch.no_grad():
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def refuse_modes() -> None:
    """Refuses to load where torch would make tensors without memory, whatever device they are asked for.

    Raises:
        DeviceError: A mode such as FakeTensorMode is active.
    """
    made = torch.empty(0, device="cpu")
    if type(made) is not torch.Tensor:
        raise DeviceError(f"torch makes {type(made).__name__}s here, which have no memory; load outside of that mode")


def refuse_unwritable(name: str, tensor: torch.Tensor) -> None:
    """Refuses what is not plain memory that `shape` and `stride` describe.

    Raises:
        DeviceError: Names the tensor, and what to give instead.
    """
    if not isinstance(tensor, torch.Tensor):
        raise DeviceError(f"out[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
    # A class that dispatches operations itself keeps its memory elsewhere; parameters, and subclasses of them, do not.
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # pyright: ignore[reportAttributeAccessIssue]  # compared, not called
        has_local = hasattr(tensor, "to_local")
        advice = f"give {name}.to_local()" if has_local else "give the plain tensor that holds its memory"
        raise DeviceError(f"out[{name!r}] is a {type(tensor).__name__}, not plain memory; {advice}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise DeviceError(f"out[{name!r}] is {kind}; give a dense tensor")
    if tensor.is_nested or not _has_storage(tensor):
        kind = "nested" if tensor.is_nested else "a tensor of torch.func without memory of its own"
        raise DeviceError(f"out[{name!r}] is {kind}; give the plain tensor that holds its memory")
    if tensor.is_conj() or tensor.is_neg():
        raise DeviceError(f"out[{name!r}] is a conjugated or negated view; give the tensor that it is a view of")
    start_bytes, num_bytes = tensor.storage_offset() * tensor.itemsize, span_bytes(tensor)
    if num_bytes and tensor.untyped_storage().nbytes() < start_bytes + num_bytes:
        raise DeviceError(
            f"out[{name!r}] has no memory: its storage was freed, as FSDP does; gather the parameter first"
        )


def _has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory that can be asked for; those that torch.func and vmap make have not."""
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def without_tied_names(out: Mapping[str, torch.Tensor], held: Iterable[str], *, rank: int) -> dict[str, torch.Tensor]:
    """`out` less the names that the checkpoint lacks because they are second names of a tensor that it has.

    The state dict of a model with tied embeddings has two names for one memory; the checkpoint has one of them.

    Raises:
        DeviceError: Another name is not held by this rank; lists them.
    """
    held = set(held)
    known = {name: tensor for name, tensor in out.items() if name in held}
    memories = {memory_of(tensor) for tensor in known.values()}
    unknown = sorted(name for name, tensor in out.items() if name not in held and memory_of(tensor) not in memories)
    if unknown:
        raise DeviceError(f"out names tensors that rank {rank} does not hold: {', '.join(unknown[:5])}")
    return known


def refuse_overlaps(out: Mapping[str, torch.Tensor]) -> None:
    """Refuses two tensors that share bytes: which of them would be right at the end is chance.

    Tensors whose elements lie between each other's, such as two column blocks of one matrix, share none.

    Raises:
        DeviceError: Names both.
    """
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + span_bytes(tensor), name)
        for name, tensor in out.items()
        if tensor.numel()
    )
    meeting: list[str] = []
    last_device, last_stop = "", 0
    for device, start, stop, name in spans:
        if device != last_device or start >= last_stop:
            _refuse_shared(meeting, out)
            meeting, last_device, last_stop = [], device, stop
        meeting.append(name)
        last_stop = max(last_stop, stop)
    _refuse_shared(meeting, out)


def _refuse_shared(names: Sequence[str], out: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors whose spans of memory meet, and that have a byte in common."""
    if len(names) < 2 or not _share_bytes([out[name] for name in names]):
        return
    one, other = next(pair for pair in itertools.combinations(names, 2) if _share_bytes([out[name] for name in pair]))
    raise DeviceError(
        f"out[{one!r}] and out[{other!r}] share memory, and the checkpoint holds both; leave one of them out, or give each its "
        "own memory"
    )


def _share_bytes(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether two of the tensors, of one memory, have a byte in common."""
    first = min(tensor.data_ptr() for tensor in tensors)
    starts = [tensor.data_ptr() - first for tensor in tensors]
    steps = [[(size, stride * tensor.itemsize) for size, stride in _dims(tensor)] for tensor in tensors]
    unit = gcd(*starts, *(tensor.itemsize for tensor in tensors), *(step for dims in steps for _, step in dims))
    views = [
        view
        for tensor, start, dims in zip(tensors, starts, steps, strict=True)
        for view in nested_views(
            start // unit,
            0,
            [*(Dim(size, step // unit, 0) for size, step in dims), Dim(tensor.itemsize // unit, 1, 0)],
        )
    ]
    return num_covered(views) < sum(view.num_elements for view in views)


def _dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(tensor.size(), tensor.stride(), strict=True) if size > 1]


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same elements of the same memory, such as two names of a tied weight."""
    return str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.size()), tensor.stride()
