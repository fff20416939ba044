"""Which bytes of a checkpoint's files are in memory that the ranks of a node share, who uses them, and what goes first?

The memory is an image of all files, one after the other, of which most is never there: a sparse memory file. It is cut into equal
cells. A table at its beginning says of each cell whether it was read, who reads it now, how many tensors use it, and when somebody
asked for it last.
Cells that nobody uses stay for ranks that come later, until the memory that the node may use is needed for others.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.errors import BudgetError
from ray_streamer.exchange.claims import Claims
from ray_streamer.extent import Extent
from ray_streamer.process_limits import limits_explained
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.staging.stop import StopSignal

_MAX_CELLS = 1 << 20
_LOOK_SECONDS = 0.002
"""How often a rank looks whether another one has read a cell: file locks wake nobody."""
_SPARE = 8
"""When room is needed, one of so many parts of the memory is freed at once, so that not every read has to look for room."""
_HEAD_BYTES, _CELL_BYTES = 24, 8 + 4 + 2 + 1
"""Bytes of the table: its head, and each cell's entry."""
_ABSENT, _EXPECTED, _READ = 0, 1, 2


@dataclass(frozen=True, slots=True)
class CellLayout:
    """Where in the shared memory each byte of the checkpoint is.

    Attributes:
        cell_bytes: Size of a cell; a multiple of the page size.
        num_cells: Cells of all files.
        image_start: Offset in the memory of the first cell; the table is before it.
        first_cells: For each file its first cell.
    """

    cell_bytes: int
    num_cells: int
    image_start: int
    first_cells: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, index: CheckpointIndex) -> CellLayout:
        """Cells so small that hardly more is read than is asked for, and so large that the table is small."""
        total = sum(file.size_bytes for file in index.files)
        cell_bytes = mmap.PAGESIZE
        while total // cell_bytes > _MAX_CELLS:
            cell_bytes *= 2
        counts = [-(-file.size_bytes // cell_bytes) for file in index.files]
        firsts = np.cumsum([0, *counts]).tolist()
        num_cells = max(firsts[-1], 1)
        table_bytes = _HEAD_BYTES + _CELL_BYTES * num_cells
        return cls(cell_bytes, num_cells, -(-table_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, tuple(firsts[:-1]))

    @property
    def num_bytes(self) -> int:
        """Length of the whole memory, nearly all of which is never touched."""
        return self.image_start + self.num_cells * self.cell_bytes

    def offset_of(self, file_id: int, byte: int) -> int:
        """Offset in the memory of a byte of a file."""
        return self.image_start + self.first_cells[file_id] * self.cell_bytes + byte

    def cells_of(self, file_id: int, extent: Extent) -> range:
        """The cells that hold bytes of `extent`."""
        first = self.first_cells[file_id]
        return range(first + extent.start // self.cell_bytes, first - (-extent.stop // self.cell_bytes))

    def extent_of(self, cells: range, file_id: int, file_bytes: int) -> Extent:
        """Which bytes of its file the cells stand for."""
        first = self.first_cells[file_id]
        start, stop = (cells.start - first) * self.cell_bytes, (cells.stop - first) * self.cell_bytes
        return Extent(start, min(stop, file_bytes))


class SharedCells:
    """One rank's hold on the shared memory; used by one thread, but for `claim` and what follows it.

    Args:
        fd: The memory file; owned from now on.
        layout: How it is cut, equal on all ranks.
        budget_bytes: Cells that nobody uses go when more than so much memory is in use.
        local_rank: Of this rank on its node.
        expect: Called with the local ranks that this one waits for now; none = the waiting is over.
        stop: Ends waiting for another rank.
    """

    def __init__(
        self,
        fd: int,
        layout: CellLayout,
        *,
        budget_bytes: int,
        local_rank: int,
        expect: Callable[[set[int]], None],
        stop: StopSignal,
    ) -> None:
        self.fd, self.layout = fd, layout
        self._budget_cells = budget_bytes // layout.cell_bytes
        self._local_rank, self._expect, self._stop = local_rank, expect, stop
        self._stopped = threading.Event()
        stop.on_set(self._stopped.set)
        with contextlib.ExitStack() as owned:
            owned.callback(os.close, fd)
            self._claims = Claims(fd)
            owned.callback(self._claims.close)
            with limits_explained("map the table of memory that ranks share"):
                self._table = mmap.mmap(fd, layout.image_start)
            self._owned = owned.pop_all()
        count = layout.num_cells
        # How many cells are there, a clock that counts reads, and who changes the table.
        self._numbers: NDArray[np.int64] = np.frombuffer(self._table, np.int64, 3)
        self._used_at: NDArray[np.int64] = np.frombuffer(self._table, np.int64, count, _HEAD_BYTES)
        # One for each tensor of each rank: a cell of a large checkpoint may hold a quarter of a million scales.
        self._num_users: NDArray[np.uint32] = np.frombuffer(self._table, np.uint32, count, _HEAD_BYTES + 8 * count)
        # One more than the local rank that reads the cell now.
        self._readers: NDArray[np.uint16] = np.frombuffer(self._table, np.uint16, count, _HEAD_BYTES + 12 * count)
        self._state: NDArray[np.uint8] = np.frombuffer(self._table, np.uint8, count, _HEAD_BYTES + 14 * count)

    @staticmethod
    def make_memory(layout: CellLayout) -> int:
        """A memory file of that layout, of which nothing is there yet; the caller closes it.

        Raises:
            BudgetError: The system refuses it.
        """
        with limits_explained("share memory between the ranks of this node"):
            fd = os.memfd_create("ray_streamer-shared", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, layout.num_bytes)
        except OSError as error:
            os.close(fd)
            raise BudgetError(f"cannot share {exact_bytes(layout.num_bytes)} of sparse memory: {error}") from error
        return fd

    def hold(self, ranges: Iterable[range]) -> None:
        """Nobody gives these cells back until `let_go`; makes room for those that are not there yet."""
        with self._locked():
            self._numbers[1] += 1
            for cells in ranges:
                held = slice(cells.start, cells.stop)
                self._num_users[held] += 1
                self._used_at[held] = self._numbers[1]
                absent = self._state[held] == _ABSENT
                self._state[held][absent] = _EXPECTED
                self._numbers[0] += int(absent.sum())
            if self._numbers[0] > self._budget_cells:
                self._make_room()

    def let_go(self, ranges: Iterable[range]) -> None:
        """This rank does not use the cells any more."""
        ranges = list(ranges)
        if ranges:
            with self._locked():
                for cells in ranges:
                    self._num_users[cells.start : cells.stop] -= 1

    def missing(self, cells: range, max_cells: int) -> list[range]:
        """Those of the cells that nobody has read yet, as runs of at most `max_cells`."""
        unread = np.flatnonzero(self._state[cells.start : cells.stop] != _READ) + cells.start
        runs: list[range] = []
        for cell in unread.tolist():
            if runs and runs[-1].stop == cell and len(runs[-1]) < max_cells:
                runs[-1] = range(runs[-1].start, cell + 1)
            else:
                runs.append(range(cell, cell + 1))
        return runs

    def claim(self, cells: range) -> bool:
        """Whether this rank is to read the cells now; False while another one reads some of them. Ends with `set_read`, or `unclaim`."""
        is_mine = self._claims.take(cells.start + 1, cells.stop + 1)
        if is_mine:
            self._readers[cells.start : cells.stop] = self._local_rank + 1
        return is_mine

    def set_read(self, cells: range) -> None:
        """The cells hold the file's bytes now."""
        self._state[cells.start : cells.stop] = _READ

    def unclaim(self, cells: range) -> None:
        """Another rank may try, unless the cells are read."""
        self._readers[cells.start : cells.stop] = 0
        self._claims.give_back(cells.start + 1, cells.stop + 1)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the length of the block this rank waits for others, by `pause`."""
        try:
            yield
        finally:
            self._expect(set())

    def pause(self, cells: range) -> None:
        """Waits a moment for the ranks that read any of the cells.

        Raises:
            BaseException: What ended the session, such as a rank that hangs.
        """
        self._pause({reader - 1 for reader in np.unique(self._readers[cells.start : cells.stop]).tolist() if reader})

    def copy_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with what lies at `offset` of the memory."""
        while buffer:
            num_bytes = os.preadv(self.fd, [buffer], offset)
            assert num_bytes, "the memory ends"
            buffer, offset = buffer[num_bytes:], offset + num_bytes

    def close(self) -> None:
        """Leaves the memory; what is mapped of it stays as long as somebody uses it."""
        self._stop.forget(self._stopped.set)
        del self._used_at, self._num_users, self._readers, self._state, self._numbers, self._table
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._claims.take(0, 1):
            with self.waiting():
                while not self._claims.take(0, 1):
                    self._pause({int(self._numbers[2])})
        self._numbers[2] = self._local_rank
        try:
            yield
        finally:
            self._claims.give_back(0, 1)

    def _pause(self, local_ranks: set[int]) -> None:
        self._expect(local_ranks)
        self._stopped.wait(_LOOK_SECONDS)
        self._stop.check()

    def _make_room(self) -> None:
        """Gives back what was not asked for the longest time, of what nobody uses."""
        unused = np.flatnonzero((self._state != _ABSENT) & (self._num_users == 0))
        surplus = int(self._numbers[0]) - self._budget_cells + self._budget_cells // _SPARE
        going = np.sort(unused[np.argsort(self._used_at[unused], kind="stable")[:surplus]])
        for run in np.split(going, np.flatnonzero(np.diff(going) > 1) + 1):
            if len(run):
                self._give_back(range(int(run[0]), int(run[-1]) + 1))

    def _give_back(self, cells: range) -> None:
        self._state[cells.start : cells.stop] = _ABSENT
        self._numbers[0] -= len(cells)
        start = self.layout.image_start + cells.start * self.layout.cell_bytes
        with mmap.mmap(self.fd, len(cells) * self.layout.cell_bytes, offset=start) as mapped:
            mapped.madvise(mmap.MADV_REMOVE)
