"""How do elements come into a result of another dtype? Cast by torch, piece by piece, on their way out of a block.

A block may begin or end in the middle of an element, when a tensor does not lie on multiples of its element size. The parts
of such an element come with different blocks, in any order, so they wait here for each other: a few bytes for each edge of a
block. Beyond that, each thread needs room for one block's pieces while it casts them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_streamer.device.caller_memory import writable_alias

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.device.results import Results
    from ray_streamer.planning.rank_plan import Piece


class Casts:
    """The casts of one rank's load; made in the caller's thread, then safe to call from many threads."""

    def __init__(self, results: Results) -> None:
        self._results = results
        # The caller's own: what it has queued for memory that it gave back, or lent, comes before what is written here.
        self._stream = torch.cuda.current_stream(results.device) if results.device.type == "cuda" else None
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], dict[int, int]] = {}

    def deliver(self, source: NDArray[np.uint8], pieces: list[Piece]) -> list[Piece]:
        """Casts those pieces whose results have another dtype; returns the others. Done with them when it returns."""
        plain: list[Piece] = []
        for piece in pieces:
            if self._results.is_cast(piece.tensor):
                self._deliver_piece(source, piece)
            else:
                plain.append(piece)
        return plain

    def _deliver_piece(self, source: NDArray[np.uint8], piece: Piece) -> None:
        size = self._results.stored_dtype(piece.tensor).itemsize
        rows = piece.rows_of(source)
        if piece.num_runs > 1:
            # Whole runs of the tensor, and so whole elements.
            self._write(piece.tensor, piece.target_start // size, piece.target_stride // size, rows)
            return
        start, stop = piece.target_start, piece.target_start + piece.run_bytes
        first, last = -(-start // size), stop // size
        if first > last:
            self._keep(piece.tensor, start, rows[0])
            return
        self._keep(piece.tensor, start, rows[0, : first * size - start])
        self._write(piece.tensor, first, 0, rows[:, first * size - start : last * size - start])
        self._keep(piece.tensor, last * size, rows[0, last * size - start :])

    def _keep(self, tensor: int, start: int, part: NDArray[np.uint8]) -> None:
        """Keeps a part of an element, `start` bytes into the result as it is stored, until the element is whole."""
        if not len(part):
            return
        size = self._results.stored_dtype(tensor).itemsize
        element = start // size
        key = (id(self._results.result(tensor).tensor), element)
        with self._lock:
            known = self._parts.setdefault(key, {})
            known.update(zip(range(start - element * size, size), part.tolist(), strict=False))
            if len(known) < size:
                return
            del self._parts[key]
        whole = np.array([known[at] for at in range(size)], dtype=np.uint8).reshape(1, size)
        self._write(tensor, element, 0, whole)

    def _write(self, tensor: int, element: int, stride: int, rows: NDArray[np.uint8]) -> None:
        """Casts rows of stored elements to their places, `stride` elements apart from the one at `element` on."""
        if not rows.size:
            return
        # A copy of our own: staged memory may be read-only, and elements in it not aligned.
        values = torch.from_numpy(np.array(rows, order="C")).view(self._results.stored_dtype(tensor))
        flat = writable_alias(self._results.result(tensor).tensor).view(-1)
        with torch.cuda.stream(self._stream):
            flat.as_strided(tuple(values.shape), (stride, 1), flat.storage_offset() + element).copy_(values)
        if self._stream is not None:
            self._stream.synchronize()
