"""What rank processes do through the API of Run:ai's streamer, on order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ray_streamer.compat.runai import DistributedStreamer, FileChunks, SafetensorsStreamer, list_safetensors
from ray_streamer.storage.posix import PosixStorage

if TYPE_CHECKING:
    from collections.abc import Collection


class Streamed(NamedTuple):
    """What a rank saw.

    Attributes:
        names: Of tensors that it got, sorted.
        wrong: Of those that differ from what safetensors reads.
        bytes_read: By this rank, without headers.
        group_sizes: That a raw streamer told while it streamed.
    """

    names: list[str]
    wrong: list[str]
    bytes_read: int
    group_sizes: set[int]


def stream(
    folder: str,
    *,
    store: str,
    rank: int,
    is_distributed: bool,
    tensor_names: Collection[str] | None = None,
    stops_after: int | None = None,
) -> Streamed:
    """Streams all files of a folder as one of two ranks of a gloo group."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    inner, sizes = PosixStorage.read_into, list[int]()

    def read_into(self, path, extent, buffer, **keywords) -> None:
        sizes.append(extent.num_bytes)
        inner(self, path, extent, buffer, **keywords)

    PosixStorage.read_into = read_into
    try:
        paths = list_safetensors(folder)
        expected = {} if "broken" in folder else {n: t for path in paths for n, t in load_file(path).items()}
        wrong, names = [], []
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths, is_distributed=is_distributed, tensor_names=tensor_names)
            for number, (name, tensor) in enumerate(streamer.get_tensors()):
                if number == stops_after:
                    break
                names.append(name)
                if not _are_same(tensor, expected[name]):
                    wrong.append(name)
        bytes_read = sum(sizes)
        return Streamed(sorted(names), wrong, bytes_read, {_group_size(paths[0])})
    finally:
        PosixStorage.read_into = inner
        dist.destroy_process_group()


def _are_same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """By their bits: among random ones are NaNs."""
    forms_agree = (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    return forms_agree and torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (tensor, expected)))


def _group_size(path: str) -> int:
    """How many ranks read raw bytes together; all ranks ask."""
    with DistributedStreamer() as streamer:
        streamer.stream_files([FileChunks(0, path, [0, 100], [8, 5000])], None, "cpu", True)
        size = streamer.get_group_size()
        with open(path, "rb") as file:
            data = file.read(5100)
        expected = {0: data[:8], 1: data[100:]}
        assert {at: chunk.numpy().tobytes() for _, at, chunk in streamer.get_chunks()} == expected
    return size
