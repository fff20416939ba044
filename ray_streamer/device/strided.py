"""How does a part of a strided move reach its result? As boxes of elements, each one strided copy; cast by torch where dtypes differ.

    the block's bytes ─> elements of the move that lie in them ─> boxes ─> host memory: copied in tiles, without room of its own
                                                                       ─> other dtype, or a device: packed chunk by chunk, then copied

A block may begin or end in the middle of an element, when a tensor does not lie on multiples of its element size. The parts
of such an element come with different blocks, in any order, so they wait here for each other: a few bytes for each edge of a
block. Beyond that, each thread needs room for one chunk.
"""

from __future__ import annotations

import threading
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.device.first_touch import fault_in
from ray_streamer.planning.views import boxes_between, index_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from ray_streamer.device.base import Result
    from ray_streamer.planning.pattern_copies import StridedMove
    from ray_streamer.planning.rank_plan import StridedPiece
    from ray_streamer.planning.views import Box

CHUNK_BYTES = 1 << 20
TILE = 128
"""Elements along either side of a tile of a transposition: both of its memories fit a core's cache."""

_LEAST_IN_PARALLEL = 1 << 15
"""Elements from which on torch copies in several threads (`at::internal::GRAIN_SIZE` of torch 2.13)."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _View(NamedTuple):
    """Elements of a memory: its first one in bytes, sizes, and strides in bytes."""

    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, memory: NDArray[np.uint8], width: int) -> NDArray[np.unsignedinteger]:
        """The elements in `memory`, aligned or not.

        Raises:
            ValueError: They do not lie within it.
        """
        return np.ndarray(self.sizes, _UNSIGNED[width], memory, self.start, self.strides)


class StridedCopies:
    """The strided copies of one rank's load; made in the caller's thread, then safe to call from many threads.

    Args:
        device: Where results lie that the host cannot access.
    """

    def __init__(self, device: torch.device) -> None:
        # The caller's own: what it has queued for memory that it gave back, or lent, comes before what is written here.
        self._stream = _current_stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._torn: dict[tuple[int, StridedMove, int, int], dict[int, int]] = {}
        self._has_threads = False

    def deliver(self, source: NDArray[np.uint8], piece: StridedPiece, target: Result) -> int:
        """Copies the part of a move that lies in a block; done with the block when it returns.

        Args:
            source: The block's bytes.
            piece: Which move, and where its tensor and its target begin.
            target: The result.

        Returns:
            Bytes of the result that were written.
        """
        move, view = piece.move, piece.move.view
        width = move.source_dtype.num_bits // 8
        # The block's bytes from the first one of the view, and the elements that lie wholly within them.
        start = -(piece.source_start + view.offset * width)
        stop = start + len(source)
        first, last = -(-start // width), stop // width
        num_elements = 0
        for box in boxes_between(view.dims, first, last):
            self._copy_box(source, -start, piece, box, target)
            num_elements += prod(size for _, size in box)
        for element in dict.fromkeys((start // width, last)):
            low, high = max(start, element * width), min(stop, (element + 1) * width)
            index = index_at(view.dims, element) if low < high and high - low < width else None
            if index is None:
                continue
            whole = self._join(piece, element, low - element * width, source[low - start : high - start])
            if whole is not None:
                box = tuple((at, 1) for at in index)
                self._copy_box(whole, -element * width, piece, box, target)
                num_elements += 1
        if self._stream is not None:
            self._stream.synchronize()
        return num_elements * move.bytes_per_element

    def _join(self, piece: StridedPiece, element: int, at: int, part: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Keeps the bytes of an element from byte `at` of it on, until all are there."""
        width = piece.move.source_dtype.num_bits // 8
        key = (piece.result, piece.move, piece.target_start, element)
        with self._lock:
            known = self._torn.setdefault(key, {})
            known.update(enumerate(part.tolist(), start=at))
            if len(known) < width:
                return None
            del self._torn[key]
        return np.array([known[byte] for byte in range(width)], dtype=np.uint8)

    def _copy_box(
        self, source: NDArray[np.uint8], source_start: int, piece: StridedPiece, box: Box, target: Result
    ) -> None:
        """Copies the elements of a box; the view's first element is at `source_start` of `source`."""
        move = piece.move
        widths = move.source_dtype.num_bits // 8, move.target_dtype.num_bits // 8
        is_cast = move.source_dtype != move.target_dtype
        if target.address is not None:
            _fault_in(target.address, piece, box)
        host_bytes = None if is_cast or target.address is None else target.host_bytes()
        for firsts, sizes in _chunks(move, box, is_tiled=host_bytes is not None):
            steps = list(zip(firsts, move.view.dims, strict=True))
            read = _View(
                source_start + sum(at * dim.stride for at, dim in steps) * widths[0],
                (*sizes, *(size for size, _ in move.repeats)),
                (*(dim.stride * widths[0] for dim in move.view.dims), *(0 for _ in move.repeats)),
            )
            write = _View(
                piece.target_start + (move.view.other + sum(at * dim.other for at, dim in steps)) * widths[1],
                read.sizes,
                tuple(stride * widths[1] for stride in _target_strides(move)),
            )
            if host_bytes is not None:
                np.copyto(write.of(host_bytes, widths[1]), read.of(source, widths[0]))
            else:
                self._copy_packed(source, read, write, move, target)

    def _copy_packed(
        self, source: NDArray[np.uint8], read: _View, write: _View, move: StridedMove, target: Result
    ) -> None:
        """Copies elements through a chunk of their own: staged memory may be read-only, and elements in it not aligned."""
        import torch

        width = move.source_dtype.num_bits // 8
        kept = len(read.sizes) - len(move.repeats)
        packed = np.array(_View(read.start, read.sizes[:kept], read.strides[:kept]).of(source, width), order="C")
        is_cast = move.source_dtype != move.target_dtype
        # Where nothing is cast, bytes are moved as they are: torch makes other bytes of some truth values.
        dtypes = [
            getattr(torch, dtype.torch_name if is_cast else f"int{8 * width}")
            for dtype in (move.source_dtype, move.target_dtype)
        ]
        if not self._has_threads:
            self._find_threads()
        values = torch.from_numpy(packed.reshape(-1).view(np.uint8)).view(dtypes[0])
        values = values.reshape((*read.sizes[:kept], *(1 for _ in move.repeats))).expand(read.sizes)
        item = dtypes[1].itemsize
        flat = target.storage_view(dtypes[1])
        strides = [stride // item for stride in write.strides]
        written = flat.as_strided(write.sizes, strides, flat.storage_offset() + write.start // item)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                written.copy_(values)
        else:
            _copy_in_one_thread(written, values)

    def _find_threads(self) -> None:
        """One thread alone asks torch for its threads: in a forked process it makes them anew, which two at once break (torch 2.13)."""
        import torch

        with self._lock:
            torch.get_num_threads()
            self._has_threads = True


def _copy_in_one_thread(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies parts so small that torch starts no team of threads for them: every thread that copies would have one of its own.

    A machine of 64 cores had 964 threads so, and where a process may have fewer, OpenMP ends it without an error.
    """
    if source.numel() < _LEAST_IN_PARALLEL:
        target.copy_(source)
        return
    dim = max(range(source.dim()), key=lambda at: source.shape[at])
    length = max(1, (_LEAST_IN_PARALLEL - 1) * source.shape[dim] // source.numel())
    for one, other in zip(target.split(length, dim), source.split(length, dim), strict=True):
        _copy_in_one_thread(one, other)


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.current_stream(device)


def _fault_in(address: int, piece: StridedPiece, box: Box) -> None:
    """Brings in the pages that a box writes, unless they are few among many."""
    move, width = piece.move, piece.move.target_dtype.num_bits // 8
    first = move.view.other + sum(at * dim.other for (at, _), dim in zip(box, move.view.dims, strict=True))
    sizes = [*(size for _, size in box), *(size for size, _ in move.repeats)]
    max_offset = sum((size - 1) * stride for size, stride in zip(sizes, _target_strides(move), strict=True))
    if max_offset < 4 * prod(sizes):
        start = piece.target_start + first * width
        fault_in(address + start, (max_offset + 1) * width)


def _target_strides(move: StridedMove) -> Sequence[int]:
    return [*(dim.other for dim in move.view.dims), *(stride for _, stride in move.repeats)]


def _chunks(move: StridedMove, box: Box, *, is_tiled: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box in parts, as first indices and sizes: tiles, or what fits a chunk."""
    sizes = [size for _, size in box]
    most = _tile(move, sizes) if is_tiled else _chunk(sizes, move.source_dtype.num_bits // 8)
    firsts = [range(first, first + size, step) for (first, size), step in zip(box, most, strict=True)]
    for starts in product(*firsts):
        yield (
            starts,
            tuple(
                min(step, first + size - start) for start, (first, size), step in zip(starts, box, most, strict=True)
            ),
        )


def _tile(move: StridedMove, sizes: list[int]) -> list[int]:
    """Largest sizes of a tile: all of the box, unless its two memories run along different dimensions."""
    most = [max(size, 1) for size in sizes]
    dims = [at for at, size in enumerate(sizes) if size > 1]
    if len(dims) > 1:
        along_target = min(dims, key=lambda at: move.view.dims[at].other)
        if along_target != dims[-1]:
            most[along_target] = most[dims[-1]] = TILE
    return most


def _chunk(sizes: list[int], width: int) -> list[int]:
    """Largest sizes of a chunk: whole inner dimensions as long as they fit."""
    room = max(1, CHUNK_BYTES // width)
    most: list[int] = []
    for size in reversed(sizes):
        most.append(max(1, min(size, room)))
        room = max(1, room // most[-1])
    return most[::-1]
