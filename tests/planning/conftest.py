"""Small real checkpoints in memory, and a slow, obvious interpreter of plans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ray_streamer.checkpoint.header import parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.dtypes import dtype_named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ray_streamer.planning.rank_plan import Piece, StridedPiece
    from ray_streamer.planning.read_plan import ReadPlan

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""


@dataclass(frozen=True)
class TinyCheckpoint:
    """An index and the bytes of the files that it describes."""

    index: CheckpointIndex
    contents: tuple[bytes, ...]

    def tensor_bytes(self, tensor: int) -> bytes:
        extent = self.index.extent_of(tensor)
        return self.contents[self.index.file_ids[tensor]][extent.start : extent.stop]


@dataclass
class Delivery:
    """One rank's result tensor after a plan was carried out: its bytes, and how often each one was written."""

    data: NDArray[np.uint8]
    num_writes: NDArray[np.int64]


def _file(tensors: Sequence[TensorSpec], *, order: Sequence[int], padding: int, seed: int) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in tensors:
        num_bits = int(np.prod(shape, dtype=np.int64)) * dtype_named(dtype).num_bits
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bits // 8]}
        offset += num_bits // 8
    names = list(entries)
    text = json.dumps({names[position]: entries[names[position]] for position in order}).encode() + b" " * padding
    data = np.random.default_rng(seed).integers(0, 256, offset, dtype=np.uint8).tobytes()
    return len(text).to_bytes(8, "little") + text + data


def _make(
    tensors_by_file: Sequence[Sequence[TensorSpec]],
    *,
    orders: Sequence[Sequence[int]] | None = None,
    padding: int = 0,
    etag: str = "e",
) -> TinyCheckpoint:
    contents = tuple(
        _file(tensors, order=orders[number] if orders else range(len(tensors)), padding=padding, seed=number)
        for number, tensors in enumerate(tensors_by_file)
    )
    files = [ShardFile(f"{number:05d}.safetensors", len(data), etag) for number, data in enumerate(contents)]
    headers = [
        parse_header(data, file=file.path, size_bytes=len(data)) for file, data in zip(files, contents, strict=True)
    ]
    return TinyCheckpoint(CheckpointIndex.from_headers("memory://tiny", files, headers), contents)


def _execute(plan: ReadPlan, contents: Sequence[bytes]) -> dict[tuple[int, str], Delivery]:
    deliveries: dict[tuple[int, str], Delivery] = {}
    for rank in range(plan.topology.num_ranks):
        mine = plan.rank_plan(rank)
        held = [
            Delivery(np.zeros(size, np.uint8), np.zeros(size, np.int64))
            for size in (spec.num_storage_elements * spec.stored.num_bits // 8 for spec in mine.results)
        ]
        for number in mine.taken.tolist():
            block = mine.block(number)
            data = np.frombuffer(contents[block.file][block.extent.start : block.extent.stop], np.uint8)
            pieces = mine.pieces(number)
            for piece in pieces.plain:
                _execute_piece(piece, data, held[piece.result])
            for part in pieces.strided:
                _execute_part(part, data, held[part.result])
        deliveries |= {(rank, name): held[at] for at, name in enumerate(mine.results.names)}
    return deliveries


def _execute_piece(piece: Piece, data: NDArray[np.uint8], delivery: Delivery) -> None:
    for run in range(piece.num_runs):
        source = piece.source_start + run * piece.source_stride
        target = piece.target_start + run * piece.target_stride
        assert 0 <= source < source + piece.run_bytes <= len(data), "a piece leaves its block"
        assert 0 <= target < target + piece.run_bytes <= len(delivery.data), "a piece leaves its tensor"
        delivery.data[target : target + piece.run_bytes] = data[source : source + piece.run_bytes]
        delivery.num_writes[target : target + piece.run_bytes] += 1


def _execute_part(part: StridedPiece, data: NDArray[np.uint8], delivery: Delivery) -> None:
    """Byte by byte, those that lie in the block."""
    move = part.move
    assert move.source_dtype == move.target_dtype
    width = move.source_dtype.num_bits // 8
    for index in product(*(range(dim.size) for dim in move.view.dims)):
        source = part.source_start + width * (
            move.view.offset + sum(at * dim.stride for at, dim in zip(index, move.view.dims, strict=True))
        )
        target = part.target_start + width * (
            move.view.other + sum(at * dim.other for at, dim in zip(index, move.view.dims, strict=True))
        )
        for byte in range(width):
            if 0 <= source + byte < len(data):
                delivery.data[target + byte] = data[source + byte]
                delivery.num_writes[target + byte] += 1


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., TinyCheckpoint]:
    """Builds a checkpoint of random bytes from tensors by file; `orders` permutes the entries of each header."""
    return _make


@pytest.fixture(scope="session")
def execute() -> Callable[[ReadPlan, Sequence[bytes]], dict[tuple[int, str], Delivery]]:
    """Carries a plan out byte by byte; what it delivered by (rank, result)."""
    return _execute
