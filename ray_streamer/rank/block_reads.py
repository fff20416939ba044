"""How does a block leave storage? Into staging memory, or, when one rank alone wants it in one piece, to where it belongs.

host memory of the tensor    the storage reads into it
device memory                the device reads a local file itself, where it can (GPUDirect Storage)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import ShardFile
    from ray_streamer.device.base import Device
    from ray_streamer.planning.rank_plan import Block, Piece, RankPlan
    from ray_streamer.rank.results import Results
    from ray_streamer.rank.statistics import Counters
    from ray_streamer.storage.base import Storage


class BlockReads:
    """The reads of one rank, counted; safe to use from many threads.

    Attributes:
        files_of_device: Numbers of the files that the device read, which knows nothing of the index: whether they are still
            the same is to be asked afterwards.
    """

    def __init__(
        self,
        mine: RankPlan,
        results: Results,
        *,
        storage: Storage,
        device: Device,
        counters: Counters,
    ) -> None:
        self._mine, self._results = mine, results
        self._storage, self._device, self._counters = storage, device, counters
        self.files_of_device: set[int] = set()

    def read_into(self, block: Block, buffer: memoryview) -> None:
        """Reads a block into the caller's memory."""
        shard_file = self._file_of(block)
        with self._counters.timed("read_seconds"):
            self._storage.read_into(shard_file.path, block.extent, buffer, etag=shard_file.etag)
        self._counters.add(bytes_read=block.extent.num_bytes, num_requests=1)

    def read_directly(self, block: Block) -> bool:
        """Reads a block to where it belongs, without staging; whether that was possible."""
        piece = self._mine.exclusive_piece(block.number)
        if piece is None:
            return False
        if not (self._read_onto_device(block, piece) or self._read_into_tensor(block, piece)):
            return False
        self._counters.add(direct_bytes=block.extent.num_bytes)
        return True

    def _read_onto_device(self, block: Block, piece: Piece) -> bool:
        if not self._device.reads_files:
            return False
        file_name = self._storage.local_path(self._file_of(block).path)
        if file_name is None:
            return False
        self.files_of_device.add(block.file)
        with self._counters.timed("read_seconds"):
            self._device.read_file(file_name, block.extent, self._results.result(piece.result), piece.target_start)
        self._counters.add(bytes_read=block.extent.num_bytes, num_requests=1)
        return True

    def _read_into_tensor(self, block: Block, piece: Piece) -> bool:
        if self._storage.prefers_aligned(self._file_of(block).path):
            return False
        result = self._results.result(piece.result)
        memory = self._device.landing(result, piece.target_start, piece.target_start + piece.run_bytes)
        if memory is None:
            return False
        self.read_into(block, memory.data)
        return True

    def _file_of(self, block: Block) -> ShardFile:
        return self._mine.files[block.file]
