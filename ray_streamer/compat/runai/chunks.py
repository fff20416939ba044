"""Which bytes of which files are meant by requests for raw ranges? Indices whose "tensors" are those ranges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.arguments import whole_number
from ray_streamer.checkpoint import CheckpointIndex, ShardFile
from ray_streamer.compat.runai.arguments import items_of
from ray_streamer.compat.runai.errors import FileAccessError
from ray_streamer.dtypes import DTYPE_CODES
from ray_streamer.errors import SettingsError
from ray_streamer.files.pull import identities
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.storage import Storage


@dataclass(frozen=True)
class FileChunks:
    """Ranges of one file, in any order.

    Attributes:
        id: The caller's name for the request; comes back with each range.
        path: Of the file.
        offsets: First byte of each range in the file.
        sizes: Bytes of each range.

    Raises:
        SettingsError: `offsets` and `sizes` differ in length, or are no whole numbers.
    """

    id: int
    path: str
    offsets: list[int]
    sizes: list[int]

    def __post_init__(self) -> None:
        for name in ("offsets", "sizes"):
            object.__setattr__(self, name, _whole_numbers(self.path, name, getattr(self, name)))
        if len(self.offsets) != len(self.sizes):
            raise SettingsError(
                f"{self.path}: a range needs an offset and a size, got {len(self.offsets)} offsets and {len(self.sizes)} sizes"
            )

    @classmethod
    def contiguous(cls, id: int, path: str, offset: int, sizes: list[int]) -> Self:
        """Ranges that follow each other from byte `offset`.

        >>> FileChunks.contiguous(0, "model.bin", 5, [1, 2, 3]).offsets
        [5, 6, 8]
        """
        whole = _whole_numbers(path, "sizes", sizes)
        starts = list(accumulate(whole, initial=whole_number(f"{path}: offset", offset)))
        return cls(id, path, starts[:-1], whole)

    def total_size(self) -> int:
        """Bytes of all ranges."""
        return sum(self.sizes)

    def max_chunk_size(self) -> int:
        """Bytes of the largest range.

        Raises:
            ValueError: There is none.
        """
        return max(self.sizes)


def _whole_numbers(path: str, name: str, given: object) -> list[int]:
    """Numbers of bytes, as a list.

    Raises:
        SettingsError: They are none, or not all of them.
    """
    numbers = items_of(f"{path}: {name}", object, given)
    return [whole_number(f"{path}: each of {name}", number) for number in numbers]


def index_of_chunks(
    storage: Storage, paths: Sequence[str], requests: Sequence[FileChunks], *, first: int, concurrency: int
) -> CheckpointIndex:
    """An index with one row of bytes for each range, called "<number of the request>:<number of the range>".

    Args:
        storage: Has all files.
        paths: Of each request's file, in the storage.
        requests: What is wanted.
        first: Number of the first request.
        concurrency: Files asked for at the same time.

    Raises:
        FileAccessError: A range leaves its file.
        StorageError: A file is not there.
    """
    unique = list(dict.fromkeys(paths))
    known = dict(zip(unique, identities(storage, unique, concurrency=concurrency), strict=True))
    files = [ShardFile(path, known[path].size_bytes, known[path].etag) for path in paths]
    rows: list[tuple[str, int, int, int]] = []
    for number, (file, request) in enumerate(zip(files, requests, strict=True)):
        for at, (offset, size) in enumerate(zip(request.offsets, request.sizes, strict=True)):
            if offset < 0 or size < 0 or offset + size > file.size_bytes:
                raise FileAccessError(
                    f"{request.path}: the range of {size} bytes at offset {offset} is not in the file, which has "
                    f"{exact_bytes(file.size_bytes)}"
                )
            rows.append((f"{first + number}:{at}", number, offset, offset + size))
    rows.sort(key=lambda row: row[1:])
    starts = np.array([row[2] for row in rows], dtype=np.int64)
    stops = np.array([row[3] for row in rows], dtype=np.int64)
    return CheckpointIndex(
        uri=storage.uri,
        files=tuple(files),
        names=tuple(row[0] for row in rows),
        dtype_codes=np.full(len(rows), DTYPE_CODES["U8"], dtype=np.uint8),
        shapes=(stops - starts).reshape(-1, 1),
        num_dims=np.ones(len(rows), dtype=np.uint8),
        file_ids=np.array([row[1] for row in rows], dtype=np.int32),
        starts=starts,
        stops=stops,
    )
