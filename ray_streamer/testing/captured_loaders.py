"""Does a captured loader leave what the loader itself leaves? It runs twice, and moves are made by torch's own strided copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ray_streamer.capture import Capture, CaptureReport
from ray_streamer.testing.layouts import TensorSpec
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.slices import RankSlices

Tensors = dict[str, torch.Tensor]
Loader = Callable[[Iterable[tuple[str, torch.Tensor]], Tensors], object]
"""Takes names and tensors, and fills the targets of the given names."""

NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.complex64: "C64",
}


def numbered(*shape: int, dtype: torch.dtype = torch.float32, start: int = 1) -> torch.Tensor:
    """A tensor whose elements differ, as far as the dtype can tell."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float64).remainder(251).reshape(shape).to(dtype)


@dataclass
class Reads:
    """A reader that keeps what it was asked for."""

    tensors: Tensors
    names: list[str] = field(default_factory=list)

    def __call__(self, names: Sequence[str]) -> Tensors:
        """The tensors themselves: whoever writes to them is found out."""
        self.names += names
        return {name: self.tensors[name] for name in names}


@dataclass
class Captured:
    """What a captured run left behind."""

    targets: Tensors
    report: CaptureReport
    slices: RankSlices
    reads: list[str]
    out: Tensors


def index_of(tensors: Tensors) -> CheckpointIndex:
    """The headers of a checkpoint of these tensors."""
    specs = [TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    return header_only_index(specs, num_files=1)


def make_moves(slices: RankSlices, out: Tensors, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    """Makes every move as torch would: a strided view copied into a strided view."""
    for row in range(len(slices)):
        source = tensors[names[int(slices.tensor_ids[row])]].contiguous()
        target = out[slices.results.names[int(slices.result_ids[row])]]
        for move in slices.patterns[int(slices.pattern_ids[row])]:
            start = target.storage_offset() + move.target.offset + int(slices.target_offsets[row])
            view = target.as_strided(move.shape, move.target.strides, start)
            with torch.no_grad():
                view.copy_(source.as_strided(move.shape, move.source.strides, move.source.offset))


def capture(tensors: Tensors, targets: Tensors, loader: Loader) -> Captured:
    """Captures the loader, then fills what it captured."""
    index, reader = index_of(tensors), Reads({name: tensor.clone() for name, tensor in tensors.items()})
    recording = Capture(index, reader)
    with recording:
        loader(recording.tensors(list(tensors)), targets)
    slices, out = recording.slices(targets)
    make_moves(slices, out, tensors, index.names)
    for name, tensor in reader.tensors.items():
        assert same(tensor, tensors[name]), f"the loader wrote to what the reader gave for {name}"
    return Captured(targets, recording.report, slices, reader.names, out)


def assert_same(tensors: Tensors, targets: Tensors, loader: Loader) -> Captured:
    """The captured loader leaves in the targets what the loader itself leaves there; both start from the same content."""
    eager = {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in targets.items()
    }
    loader(((name, tensor.clone()) for name, tensor in tensors.items()), eager)
    captured = capture(tensors, targets, loader)
    for name, tensor in targets.items():
        assert same(tensor, eager[name]), f"{name} differs:\n{tensor}\n{eager[name]}"
    return captured


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes in the same order of elements."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)
