"""How do the ranks' results become the whole tensor again? Each element goes back to where it was taken from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.device import open_device
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.planning.views import Dim, whole_bytes
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from ray_streamer.dtypes import DType
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.planning.views import NestedView
    from ray_streamer.slices.move import Move


@dataclass(frozen=True, slots=True)
class HeldParts:
    """Where one rank holds parts of a tensor.

    Attributes:
        rank: The rank.
        result: Name of its result.
        dtype: Of the result.
        moves: From the tensor to the result.
    """

    rank: int
    result: str
    dtype: DType
    moves: tuple[Move, ...]


def find_parts(plan: ReadPlan, name: str) -> tuple[int, list[HeldParts]]:
    """The tensor of the checkpoint that a name stands for, and who holds which parts of it, ranks that hold the same once.

    Args:
        plan: The plan that was loaded.
        name: Of a result that holds one tensor; or of a tensor, where results hold several.

    Raises:
        SettingsError: There is neither, no rank holds any of it, or a result holds several tensors; names them.
    """
    tensor = _tensor_of(plan, name)
    holders: dict[tuple[Move, ...], HeldParts] = {}
    for rank, said in enumerate(plan.slices):
        for row in np.flatnonzero(said.tensor_ids == tensor).tolist():
            spec, offset = said.results[said.result_ids[row]], int(said.target_offsets[row])
            moves = tuple(move.shifted(offset) for move in said.patterns[said.pattern_ids[row]])
            holders.setdefault(moves, HeldParts(rank, spec.name, spec.stored, moves))
    if not holders:
        raise SettingsError(f"no rank holds any of {name!r}")
    return tensor, list(holders.values())


def _tensor_of(plan: ReadPlan, name: str) -> int:
    tensors: set[int] = set()
    for said in {id(said): said for said in plan.slices}.values():
        if name in said.results.names:
            tensors |= set(said.tensor_ids[said.result_ids == said.results.names.index(name)].tolist())
    if len(tensors) > 1:
        several = ", ".join(plan.index.names[tensor] for tensor in sorted(tensors))
        raise SettingsError(f"{name!r} holds several tensors, gather them by their own names: {several}")
    tensor = tensors.pop() if tensors else plan.index.find(name)
    if tensor is None:
        raise SettingsError(f"there is no tensor {name!r}; model.plan.index.names has the names of all")
    return tensor


def assemble(dtype: DType, shape: tuple[int, ...], held: Sequence[HeldParts], parts: Sequence[bytes]) -> torch.Tensor:
    """A tensor of `shape` logical elements from the results' bytes; ranks that hold the same part may repeat it.

    Raises:
        ShardingError: The parts leave some of the tensor open.
    """
    device = open_device("cpu")
    result = device.result(device.empty(dtype, shape))
    filled = result.host_bytes()
    is_filled = np.zeros(result.num_bytes, dtype=np.uint8)
    for holder, part in zip(held, parts, strict=True):
        for view in (view for move in holder.moves for view in _views(move, dtype.num_bits)):
            sizes = tuple(dim.size for dim in view.dims)
            strides = tuple(dim.stride for dim in view.dims), tuple(dim.other for dim in view.dims)
            source: NDArray[np.uint8] = np.ndarray(
                sizes, np.uint8, np.frombuffer(part, np.uint8), view.other, strides[1]
            )
            np.ndarray(sizes, np.uint8, filled, view.offset, strides[0])[...] = source
            np.ndarray(sizes, np.uint8, is_filled, view.offset, strides[0])[...] = 1
    if not is_filled.all():
        raise ShardingError(f"the ranks hold {int(is_filled.sum())} of the tensor's {exact_bytes(is_filled.size)}")
    return result.tensor


def _views(move: Move, num_bits: int) -> list[NestedView]:
    """A move in bytes: the tensor's, and with them the result's."""
    if not move.num_elements:
        return []
    steps = zip(move.shape, move.source.strides, move.target.strides, strict=True)
    dims = [Dim(*step) for step in steps if step[0] > 1 and step[1]]
    return whole_bytes(move.source.offset, move.target.offset, dims, num_bits)
