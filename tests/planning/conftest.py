"""Small real checkpoints in memory, and a slow, obvious interpreter of plans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ray_streamer.checkpoint.header import parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.dtypes import dtype_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ray_streamer.planning.read_plan import NodePlan, ReadPlan

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


def _execute(plan: ReadPlan, contents: Sequence[bytes]) -> dict[tuple[int, int], Delivery]:
    deliveries: dict[tuple[int, int], Delivery] = {}
    for tensor in range(len(plan.index)):
        for rank in range(plan.topology.num_ranks):
            held = plan.slice_of(tensor, rank)
            if held is not None:
                num_bits = plan.index.dtype_of(tensor).num_bits
                size = int(np.prod(held.shape, dtype=np.int64)) * num_bits // 8
                deliveries[rank, tensor] = Delivery(np.zeros(size, np.uint8), np.zeros(size, np.int64))
    for ranks, plan_id in zip(plan.topology.nodes, plan.node_plan_ids, strict=True):
        _execute_node(plan.node_plans[plan_id], ranks, contents, deliveries)
    return deliveries


def _execute_node(
    node_plan: NodePlan,
    ranks: tuple[int, ...],
    contents: Sequence[bytes],
    deliveries: dict[tuple[int, int], Delivery],
) -> None:
    blocks = node_plan.blocks.to_pylist()
    for piece in node_plan.pieces.to_pylist():
        block = blocks[piece["block"]]
        data = np.frombuffer(contents[block["file"]][block["start"] : block["stop"]], np.uint8)
        delivery = deliveries[ranks[piece["rank"]], piece["tensor"]]
        for run in range(piece["num_runs"]):
            source = piece["source_start"] + run * piece["source_stride"]
            target = piece["target_start"] + run * piece["target_stride"]
            assert 0 <= source < source + piece["run_bytes"] <= len(data), "a piece leaves its block"
            assert 0 <= target < target + piece["run_bytes"] <= len(delivery.data), "a piece leaves its tensor"
            delivery.data[target : target + piece["run_bytes"]] = data[source : source + piece["run_bytes"]]
            delivery.num_writes[target : target + piece["run_bytes"]] += 1


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., TinyCheckpoint]:
    """Builds a checkpoint of random bytes from tensors by file; `orders` permutes the entries of each header."""
    return _make


@pytest.fixture(scope="session")
def execute() -> Callable[[ReadPlan, Sequence[bytes]], dict[tuple[int, int], Delivery]]:
    """Carries a plan out run by run; what it delivered by (rank, tensor)."""
    return _execute


@pytest.fixture(scope="session")
def nodes_of() -> Callable[[ReadPlan], Iterator[tuple[tuple[int, ...], NodePlan]]]:
    """The ranks and the plan of each node."""
    return lambda plan: (
        (ranks, plan.node_plans[plan_id])
        for ranks, plan_id in zip(plan.topology.nodes, plan.node_plan_ids, strict=True)
    )
