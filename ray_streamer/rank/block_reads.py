"""How does a block leave storage? Into staging memory, or, when one rank alone wants it in one piece, to where it belongs.

host memory of the tensor    the storage reads into it
device memory                the device reads a local file itself, where it can (GPUDirect Storage)
a slot of the arena          the storage reads into it, and neighbours who want parts of the block are told
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.extent import Extent
from ray_streamer.rank.block_source import Loan, Way, keep
from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray_streamer.device.base import Device
    from ray_streamer.exchange.liveness import Activity
    from ray_streamer.planning.rank_plan import Block, Piece, RankPlan
    from ray_streamer.rank.mappings import Mappings
    from ray_streamer.rank.neighbourhood import Neighbourhood
    from ray_streamer.rank.recorder import Recorder
    from ray_streamer.rank.results import Results
    from ray_streamer.staging.arena import Arena
    from ray_streamer.storage.base import Storage


class BlockReads:
    """The reads of one rank, taken down as they go; safe to use from many threads.

    Args:
        mine: What this rank does.
        storage: Holds the files.
        activity: Told of reads under way.
        recorder: Takes down the steps of each block.
    """

    def __init__(self, mine: RankPlan, storage: Storage, *, activity: Activity, recorder: Recorder) -> None:
        self._mine, self._storage = mine, storage
        self._activity, self._recorder = activity, recorder

    def read_into(self, block: Block, buffer: memoryview) -> None:
        """Reads a block into the caller's memory."""
        file = self._mine.files[block.file]
        with self._reading(block.number) as first_byte_came:
            self._storage.read_into(file.path, block.extent, buffer, etag=file.etag, on_first_byte=first_byte_came)

    def read_onto_device(self, block: Block, device: Device, file_name: str, piece: Piece, results: Results) -> None:
        """Lets the device read a block that is all of `piece`."""
        with self._reading(block.number) as first_byte_came:
            device.read_file(file_name, block.extent, results.result(piece.result), piece.target_start)
            first_byte_came()

    @contextmanager
    def _reading(self, block: int) -> Iterator[Callable[[], None]]:
        """For the length of the block a read is under way; what it gives is called when the first byte has come."""
        recorder = self._recorder
        with self._activity.working():
            recorder.mark(Step.ASKED, block)
            yield partial(recorder.mark, Step.FIRST_BYTE, block)
            recorder.mark(Step.LAST_BYTE, block)


class DirectReads:
    """Blocks that storage brings straight to their tensor; see `BlockSource`.

    Args:
        mine: What this rank does.
        storage: Holds the files.
        device: Where the tensors are.
        results: The tensors.
        reads: Reads.
    """

    def __init__(self, mine: RankPlan, storage: Storage, device: Device, results: Results, reads: BlockReads) -> None:
        self._mine, self._storage, self._device, self._results = mine, storage, device, results
        self._reads = reads
        self._files_of_device: set[int] = set()

    def borrow(self, block: Block) -> Loan | None:
        """See `BlockSource.borrow`; the block lies in its tensor then."""
        piece = self._mine.exclusive_piece(block.number)
        if piece is None:
            return None
        if not (self._read_onto_device(block, piece) or self._read_into_tensor(block, piece)):
            return None
        return Loan(Way.DIRECT, None, keep)

    def verify(self) -> None:
        """See `BlockSource.verify`; a device opens files by name, and knows nothing of the index."""
        for file in (self._mine.files[number] for number in self._files_of_device):
            self._storage.check_unchanged(file.path, etag=file.etag)

    def _read_onto_device(self, block: Block, piece: Piece) -> bool:
        if not self._device.reads_files:
            return False
        file_name = self._storage.local_path(self._mine.files[block.file].path)
        if file_name is None:
            return False
        self._files_of_device.add(block.file)
        self._reads.read_onto_device(block, self._device, file_name, piece, self._results)
        return True

    def _read_into_tensor(self, block: Block, piece: Piece) -> bool:
        result = self._results.result(piece.result)
        memory = self._device.landing(result, piece.target_start, piece.target_start + piece.run_bytes)
        if memory is None:
            return False
        self._reads.read_into(block, memory.data)
        return True


class CachedReads:
    """Blocks of files in the page cache, of which this rank takes a few contiguous runs; see `BlockSource`.

    Every rank reads its own runs, straight into its tensors. That costs less than to copy them from a mapping, whose pages
    have to be mapped and unmapped.

    Args:
        mine: What this rank does.
        storage: Holds the files.
        device: Where the tensors are.
        results: The tensors.
        mappings: Knows the files that the node's ranks take from the page cache.
        activity: Told of reads under way.
        recorder: Takes down the steps of each block.
    """

    def __init__(
        self,
        mine: RankPlan,
        storage: Storage,
        device: Device,
        results: Results,
        mappings: Mappings,
        *,
        activity: Activity,
        recorder: Recorder,
    ) -> None:
        self._mine, self._storage, self._device, self._results = mine, storage, device, results
        self._mappings, self._activity, self._recorder = mappings, activity, recorder

    def borrow(self, block: Block) -> Loan | None:
        """See `BlockSource.borrow`; what this rank takes of the block lies in its tensors then."""
        runs = self._mine.few_runs(block.number) if block.file in self._mappings else []
        if not runs:
            return None
        file = self._mine.files[block.file]
        with self._activity.working():
            self._recorder.mark(Step.TAKEN, block.number)
            for run in runs:
                start, stop = run.target_start, run.target_start + run.run_bytes
                memory = self._device.landing(self._results.result(run.result), start, stop)
                if memory is None:
                    return None
                first = block.extent.start + run.source_start
                extent = Extent(first, first + run.run_bytes)
                self._storage.read_into(file.path, extent, memory.data, etag=file.etag)
        return Loan(Way.MAPPED, None, keep)

    def verify(self) -> None:
        """See `BlockSource.verify`; the storage compares with each read."""


class StagedReads:
    """Blocks that storage brings into this rank's arena, for itself and its neighbours; see `BlockSource`.

    Args:
        mine: What this rank does.
        arena: This rank's.
        neighbours: Told of the blocks that they want parts of.
        reads: Reads.
        recorder: Takes down the steps of each block.
    """

    def __init__(
        self, mine: RankPlan, arena: Arena, neighbours: Neighbourhood, reads: BlockReads, *, recorder: Recorder
    ) -> None:
        self._mine, self._arena, self._neighbours = mine, arena, neighbours
        self._reads, self._recorder = reads, recorder

    def borrow(self, block: Block) -> Loan:
        """See `BlockSource.borrow`; waits for a slot."""
        self._recorder.mark(Step.QUEUED, block.number)
        slot = self._arena.acquire()
        view = self._arena.view(slot, block.extent)
        try:
            self._reads.read_into(block, view)
            self._offer(block.number, slot)
        except BaseException:
            self._arena.release(slot)
            raise
        return Loan(Way.STAGED, np.frombuffer(view, dtype=np.uint8), partial(self._arena.release, slot))

    def verify(self) -> None:
        """See `BlockSource.verify`; the storage compares with each read."""

    def _offer(self, block: int, slot: int) -> None:
        """Offers a block to the neighbours that want parts of it, which hold the slot then, too."""
        consumers = self._mine.consumers(block)
        if consumers:
            self._arena.hold(slot, len(consumers))
            # Before: a neighbour may copy while this rank still tells the next one.
            self._recorder.mark(Step.ANNOUNCED, block)
            self._neighbours.announce(block, slot, consumers)
