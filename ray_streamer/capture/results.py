"""What did a captured loader fill, as the slices of its rank? Copies into storages become moves into named results.

A result is the parameter or buffer that holds a copy's elements; where several share a storage (tied weights), the first name
has it. What the loader filled that has no name among the targets, and that somebody still holds, is a result all the same.
"""

# pyright: reportPrivateUsage=false
# torch tells two storages apart under private names only.
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_streamer.capture.lazy import LazyTensor
from ray_streamer.capture.memory import view_of
from ray_streamer.capture.recorder import is_plain, whole_storage
from ray_streamer.capture.strided import holds
from ray_streamer.dtypes import DTYPES
from ray_streamer.errors import CaptureError
from ray_streamer.slices import Move, RankSlices, ResultSpec, ResultSpecs, Side

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ray_streamer.capture.pending import RecordedCopy
    from ray_streamer.capture.strided import Loop, Strided
    from ray_streamer.checkpoint import CheckpointIndex

NAMES_OF_DTYPES = {getattr(torch, dtype.torch_name): dtype.name for dtype in reversed(DTYPES) if not dtype.is_packed}
"""What safetensors calls a torch dtype whose elements are one each."""


_Shifted = tuple["tuple[Loop, ...]", int, int]
"""A copy as it may be again elsewhere: its loops, its offset in the checkpoint's tensor, and that from the first of its target."""


@dataclass(slots=True)
class _Result:
    tensor: torch.Tensor
    copies: dict[int, list[RecordedCopy]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class _Target:
    """A parameter or buffer; `view` is that of its storage, None where several of its indices are one element."""

    name: str
    tensor: torch.Tensor
    view: Strided | None
    is_dense: bool

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Target:
        view = view_of(tensor)
        return cls(name, tensor, None if view.repeats else view, view.is_dense)

    def has(self, copy: RecordedCopy) -> bool:
        """Whether every element that the copy writes is one of the tensor's."""
        if self.view is None or self.tensor.dtype != copy.dtype:
            return False
        if self.is_dense:
            size = copy.dtype.itemsize
            return self.view.start * size <= copy.extent.start and copy.extent.stop <= self.view.stop * size
        return holds(self.view, copy.target)


def slices_of(
    index: CheckpointIndex, copies: Iterable[RecordedCopy], targets: Mapping[str, torch.Tensor]
) -> tuple[RankSlices, dict[str, torch.Tensor]]:
    """The slices that `copies` say, and the real memory of each of their results.

    Args:
        index: Of the checkpoint whose tensors were captured.
        copies: No two of which write the same byte.
        targets: Parameters and buffers by name; the first name of shared memory is the result's.

    Raises:
        CaptureError: A target is itself a tensor of the checkpoint that was not read.
    """
    named = _by_storage(targets)
    results: dict[str, _Result] = {}
    for copy in copies:
        name, tensor = _result_of(copy, named, results)
        if tensor is None:
            continue
        result = results.setdefault(name, _Result(tensor))
        result.copies[index.position(copy.piece.place.tensor)].append(copy)
    return _rank_slices(results), {name: result.tensor for name, result in results.items()}


def _by_storage(targets: Mapping[str, torch.Tensor]) -> dict[int, list[_Target]]:
    named: dict[int, list[_Target]] = defaultdict(list)
    for name, tensor in targets.items():
        if isinstance(tensor, LazyTensor):
            raise CaptureError(f"{name} is {tensor!r} itself, of which no values were read; copy it into a real tensor")
        if is_plain(tensor):
            named[tensor.untyped_storage()._cdata].append(_Target.of(name, tensor))
    return named


def _result_of(
    copy: RecordedCopy, named: dict[int, list[_Target]], results: dict[str, _Result]
) -> tuple[str, torch.Tensor | None]:
    """Name and memory of the result that has the copy's elements; no memory when nobody holds it any more."""
    candidates = named.get(copy.storage._cdata, [])
    for candidate in candidates:
        if candidate.has(copy):
            return candidate.name, candidate.tensor
    # Ours is one of the two, the other is the reference that Python keeps of the same storage.
    if not candidates and not _is_held(copy.storage):
        return "", None
    name = (
        f"{candidates[0].name if candidates else 'unnamed'} ({copy.storage._cdata:x} as {NAMES_OF_DTYPES[copy.dtype]})"
    )
    known = results.get(name)
    return name, known.tensor if known else whole_storage(copy.storage, copy.dtype, copy.device)


def _is_held(storage: torch.UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(storage._cdata) > 1


def _rank_slices(results: dict[str, _Result]) -> RankSlices:
    """Rows whose patterns begin at 0, so that equal moves of many tensors and places are one pattern."""
    specs = (_spec(name, result.tensor) for name, result in results.items())
    patterns: dict[tuple[_Shifted, ...], int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for number, result in enumerate(results.values()):
        first = int(result.tensor.storage_offset())
        for tensor, copies in result.copies.items():
            start = min(copy.offset for copy in copies)
            shifted = tuple([(copy.piece.loops, copy.piece.offset, copy.offset - start) for copy in copies])
            rows.append((tensor, number, patterns.setdefault(shifted, len(patterns)), start - first))
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    tensor_ids, result_ids, pattern_ids = (np.ascontiguousarray(table[:, at], dtype=np.int32) for at in range(3))
    return RankSlices(
        ResultSpecs.of(specs),
        tuple(tuple(_move_of(*shifted) for shifted in pattern) for pattern in patterns),
        tensor_ids,
        result_ids,
        pattern_ids,
        target_offsets=np.ascontiguousarray(table[:, 3]),
    )


def _move_of(loops: tuple[Loop, ...], source_offset: int, target_offset: int) -> Move:
    return Move(
        tuple(loop.size for loop in loops),
        Side(source_offset, tuple(loop.step for loop in loops)),
        Side(target_offset, tuple(loop.other_step for loop in loops)),
    )


def _spec(name: str, tensor: torch.Tensor) -> ResultSpec:
    return ResultSpec(
        name=name,
        dtype=NAMES_OF_DTYPES[tensor.dtype],
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        zeroes_holes=False,
    )
