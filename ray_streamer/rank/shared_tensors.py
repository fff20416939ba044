"""How do the ranks of a node read tensors whole, for loaders that need their values? Each byte once, into memory that they share.

    with SharedTensors.open(session, index, storage, ...) as shared:     # every rank of the session
        tensors = shared.read(names)                                    # whatever this rank needs, whenever it does
        for name, tensor in shared.stream(names): ...                   # or all ranks at the same time, in one order

A rank asks for tensors when its loader needs them. No rank knows what the others will ask for. So ranks that need the same
bytes at about the same time read them together, a part each. A rank that comes later finds them there, while they stay: the
memory is bounded, and what was not asked for the longest time goes first. Bytes that are gone are read again.

Tensors are private views of the shared memory: what a loader writes to one, no other rank sees.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from ray_streamer.errors import ClusterError
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, DEFAULT_MEMORY_LIMIT
from ray_streamer.process_limits import limits_explained
from ray_streamer.rank.shared_cells import CellLayout, SharedCells
from ray_streamer.rank.tensor_stream import as_stored
from ray_streamer.staging.threads import TaskThreads
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.storage.base import Storage

_COPIED_BYTES = 64 << 10
"""Up to this size a tensor is copied out of the shared memory: a mapping for each scale of each expert would be too many."""
_WINDOWS = 4
"""So many windows of a stream fit into the shared memory: what ranks use, what is being read, and what a late rank still uses."""
_MAX_WINDOW_BYTES = 256 << 20


class SharedTensors:
    """One rank's way to the tensors; used by one thread at a time. Made by `open`.

    Attributes:
        bytes_read: That this rank read from the storage; bytes beside a tensor that fill its first and last cell included.
    """

    def __init__(
        self,
        session: NodeSession,
        index: CheckpointIndex,
        storage: Storage,
        cells: SharedCells,
        *,
        block_bytes: int,
        concurrency: int,
        window_bytes: int,
    ) -> None:
        self._session, self._index, self._storage, self._cells = session, index, storage, cells
        self._max_cells = max(1, block_bytes // cells.layout.cell_bytes)
        self._concurrency, self._window_bytes = concurrency, window_bytes
        # Tensors may die in any thread, in the middle of anything; what they held is let go by the next read.
        self._dropped: deque[range] = deque()
        self._counting = Lock()
        self._ahead: ThreadPoolExecutor | None = None
        self.bytes_read = 0

    @classmethod
    def open(
        cls,
        session: NodeSession,
        index: CheckpointIndex,
        storage: Storage,
        *,
        memory_limit: int,
        block_bytes: int,
        concurrency: int,
    ) -> Self:
        """Meets the other ranks of the session over memory of their own; all of them call it.

        Args:
            session: Of the ranks; stays the caller's, who closes what is returned first.
            index: Of the checkpoint, equal on all ranks.
            storage: Holds its files; stays the caller's.
            memory_limit: Bytes for each rank, equal on all ranks; all of them share the sum. -1 = the default limit. A tensor that is
                larger, and tensors that loaders hold, take more all the same.
            block_bytes: Largest storage request.
            concurrency: Reads of this rank in flight.

        Raises:
            BudgetError: The system refuses the memory.
            RankFailedError: Another rank failed.
        """
        limit = DEFAULT_MEMORY_LIMIT if memory_limit == AS_MUCH_AS_USEFUL else memory_limit
        budget_bytes = max(limit * len(session.place.ranks), _WINDOWS * block_bytes)
        layout = CellLayout.of(index)
        fd = session.share_memory(lambda: SharedCells.make_memory(layout))
        return cls(
            session,
            index,
            storage,
            SharedCells(
                fd,
                layout,
                budget_bytes=budget_bytes,
                local_rank=session.place.local_rank,
                expect=session.expect,
                stop=session.stop,
            ),
            block_bytes=block_bytes,
            concurrency=concurrency,
            window_bytes=min(_MAX_WINDOW_BYTES, budget_bytes // _WINDOWS),
        )

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of those names, contiguous, in host memory; theirs for as long as anybody holds them.

        Raises:
            KeyError: There is no such tensor.
            StorageError: A read failed; the session is over then.
            RankFailedError: Another rank failed.
        """
        self._let_go()
        positions = [self._index.position(name) for name in names]
        held = [self._cells_of(position) for position in positions]
        self._cells.hold(held)
        try:
            self._fill(positions)
            # From here on each tensor answers for its own cells.
            return {name: self._tensor(position) for name, position in zip(names, positions, strict=True)}
        except BaseException as error:
            self._session.fail(error)
            raise

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of those names in the order of their bytes, read some way ahead; every rank takes its stream to the end.

        Ranks go through the checkpoint together, so that each byte is read once: none is further than two windows ahead.

        Args:
            names: What this rank wants; nothing of the others is given to it.

        Raises:
            RayStreamerError: As `read`, or another rank left the stream.
        """
        mine = np.zeros(len(self._index), dtype=np.bool_)
        mine[[self._index.position(name) for name in names]] = True
        told = self._session.gather(np.packbits(mine).tobytes())
        masks = [np.unpackbits(np.frombuffer(mask, np.uint8), count=len(mine)) for mask in told]
        windows = self._windows(mine, np.flatnonzero(np.logical_or.reduce(masks)).tolist())
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="ray_streamer-ahead")
        coming = self._ahead.submit(self._next_window, windows)
        while (window := coming.result()) is not None:
            coming = self._ahead.submit(self._next_window, windows)
            while window:
                name = next(iter(window))
                with self._session.activity.working():
                    yield name, window.pop(name)
        self._ahead.shutdown()
        self._ahead = None

    def total_bytes_read(self) -> int:
        """What all ranks of the session read so far; every rank calls it.

        Raises:
            RankFailedError: Another rank failed.
        """
        return sum(
            int.from_bytes(told, "little") for told in self._session.gather(self.bytes_read.to_bytes(8, "little"))
        )

    def step(self) -> None:
        """Whoever uses the tensors got on, so this rank is not stuck."""
        with self._session.activity.working():
            pass

    def close(self) -> None:
        """Leaves the shared memory; tensors that somebody holds stay. A stream that was not taken to its end fails for all ranks."""
        if self._ahead is not None:
            self._session.fail(ClusterError("this rank did not take its stream of tensors to the end"))
            self._ahead.shutdown()
        self._let_go()
        self._cells.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            self._session.fail(error)
        self.close()

    def _next_window(self, windows: Iterator[list[str]]) -> dict[str, torch.Tensor] | None:
        window = next(windows, None)
        if window is None:
            return None
        # Whoever comes here has used up the window before the last one, and so has every rank after this.
        self._session.gather(b"")
        return self.read(window)

    def _windows(self, mine: NDArray[np.bool_], everyones: list[int]) -> Iterator[list[str]]:
        """This rank's part of each window; windows are cut alike on all ranks."""
        window: list[str] = []
        size = 0
        for position in everyones:
            num_bytes = self._index.extent_of(position).num_bytes
            if size and size + num_bytes > self._window_bytes:
                yield window
                window, size = [], 0
            size += num_bytes
            if mine[position]:
                window.append(self._index.names[position])
        yield window

    def _cells_of(self, position: int) -> range:
        return self._cells.layout.cells_of(int(self._index.file_ids[position]), self._index.extent_of(position))

    def _fill(self, positions: list[int]) -> None:
        """Reads what nobody has read yet of these tensors, and waits for what others read."""
        runs = [
            (int(self._index.file_ids[position]), cells)
            for position in positions
            for cells in self._cells.missing(self._cells_of(position), self._max_cells)
        ]
        # Ranks that come together begin at different places.
        place = self._session.place
        first = len(runs) * place.local_rank // len(place.ranks)
        runs = runs[first:] + runs[:first]
        others: deque[tuple[int, range]] = deque()

        def read(run: tuple[int, range]) -> None:
            if not self._read_if_free(*run):
                others.append(run)

        if len(runs) == 1:
            read(runs[0])
        elif runs:
            threads = min(self._concurrency, len(runs))
            with TaskThreads("ray_streamer-shared", threads, runs, read, self._session.stop):
                pass
            self._session.stop.check()
        with self._session.activity.waiting(), self._cells.waiting():
            for file_id, cells in others:
                while self._cells.missing(cells, 1) and not self._read_if_free(file_id, cells):
                    self._cells.pause(cells)

    def _read_if_free(self, file_id: int, cells: range) -> bool:
        """Reads the cells, or what is missing of them; False when another rank is about to read some of them."""
        if not self._cells.claim(cells):
            return False
        try:
            for run in self._cells.missing(cells, self._max_cells):
                with self._session.activity.working():
                    self._read(file_id, run)
                self._cells.set_read(run)
        finally:
            self._cells.unclaim(cells)
        return True

    def _read(self, file_id: int, cells: range) -> None:
        file, layout = self._index.files[file_id], self._cells.layout
        extent = layout.extent_of(cells, file_id, file.size_bytes)
        start = layout.offset_of(file_id, extent.start)
        # Not closed here: the error of a read that failed still holds parts of it.
        mapping = self._mapped(start, extent.num_bytes, mmap.MAP_SHARED)
        self._storage.read_into(file.path, extent, memoryview(mapping), etag=file.etag)
        with self._counting:
            self.bytes_read += extent.num_bytes

    def _tensor(self, position: int) -> torch.Tensor:
        extent, itemsize = self._index.extent_of(position), self._index.dtype_of(position).torch_bits // 8
        start = self._cells.layout.offset_of(int(self._index.file_ids[position]), extent.start)
        cells, page_offset = self._cells_of(position), start % mmap.PAGESIZE
        if extent.num_bytes <= _COPIED_BYTES or extent.start % itemsize:
            memory = torch.empty(extent.num_bytes, dtype=torch.uint8)
            self._cells.copy_into(memory.numpy().data, start)
            self._dropped.append(cells)
        else:
            mapping = self._mapped(start - page_offset, page_offset + extent.num_bytes, mmap.MAP_PRIVATE)
            weakref.finalize(mapping, self._dropped.append, cells).atexit = False
            memory = torch.frombuffer(mapping, dtype=torch.uint8, offset=page_offset, count=extent.num_bytes)
        return as_stored(memory, self._index, position)

    def _mapped(self, start: int, num_bytes: int, flags: int) -> mmap.mmap:
        with limits_explained(f"map {exact_bytes(num_bytes)} of memory that ranks share"):
            return mmap.mmap(self._cells.fd, num_bytes, flags=flags, offset=start)

    def _let_go(self) -> None:
        self._cells.let_go([self._dropped.popleft() for _ in range(len(self._dropped))])
