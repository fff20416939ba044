"""How do a rank's tensors get their bytes? Four kinds of block, each with one way from storage to the tensor.

    own, exclusive, one contiguous piece   read ──────────────────────> tensor                      (no staging; see `BlockReads`)
    own                                    read ─> slot ─> copies ────> tensor, announced to neighbours who want it
    a neighbour's                          announced ─> copies out of the neighbour's slot ─> tensor, released
    in a file that the page cache holds    copies out of a mapping ───> tensor                      (nobody reads it)

Reader threads take this rank's blocks in plan order and wait for slots; copier threads take what neighbours announce and what
mapped files hold. Which files are mapped is decided once per node, by its first rank, so that all ranks agree. A rank is done
when it has all its bytes, its slots are free again and its neighbours say the same; until then nothing is handed out.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.device.strided import StridedCopies
from ray_streamer.errors import BudgetError
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL
from ray_streamer.process_limits import limits_explained
from ray_streamer.rank.block_reads import BlockReads
from ray_streamer.rank.inbox import Announced, Inbox
from ray_streamer.rank.neighbourhood import Neighbourhood
from ray_streamer.rank.remains import clear_frames
from ray_streamer.rank.results import Results
from ray_streamer.rank.statistics import Counters, RankStatistics, process_cpu_seconds
from ray_streamer.stream.arena import Arena
from ray_streamer.stream.countdown import Countdown
from ray_streamer.stream.stop import StopSignal
from ray_streamer.stream.threads import TaskThreads
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from numpy.typing import NDArray

    from ray_streamer.device.base import Device
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.options import RankOptions
    from ray_streamer.rank.results import OnComplete
    from ray_streamer.storage.base import Storage

logger = logging.getLogger(__name__)

MAX_COPIERS = 4


class RankLoad:
    """One load of one rank; make it, `run` it once, ask it for statistics at any time.

    Args:
        plan: What this rank does.
        storage: Open on the plan's checkpoint. A load that fails closes it: that wakes reads which wait for a network.
        device: Where the tensors go.
        options: See `RankOptions`.
        session: Of this node's ranks, when they met already; else they meet for this load.
        out: Tensors of the caller, filled in place; see `Results`.
        on_complete: Called with (name, tensor) as tensors complete, from several threads; its error ends the load.

    Raises:
        BudgetError: The memory limit cannot hold one block.
        DeviceError: `out` does not fit.
    """

    def __init__(
        self,
        plan: RankPlan,
        storage: Storage,
        device: Device,
        options: RankOptions,
        *,
        session: NodeSession | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        on_complete: OnComplete | None = None,
    ) -> None:
        self._mine, self._storage, self._device, self._options = plan, storage, device, options
        self._results = Results(plan, device, out=out, on_complete=on_complete)
        self._strided = StridedCopies(self._results.device)
        self._stop = StopSignal()
        self._inbox = Inbox(self._stop)
        self._arena = Arena(self._num_slots(), plan.node_plan.limits.block_bytes, self._stop)
        self._neighbours = Neighbourhood(
            self._mine, options, session, inbox=self._inbox, arena=self._arena, stop=self._stop
        )
        self._activity = self._neighbours.activity
        self._views: dict[int, NDArray[np.uint8]] = {}
        self._counters = Counters()
        self._reads = BlockReads(plan, self._results, storage=storage, device=device, counters=self._counters)
        self._blocks_left = Countdown(self._stop)
        self._stop.on_set(storage.close)

    def run(self) -> dict[str, torch.Tensor]:
        """Loads this rank's tensors.

        Returns:
            Every tensor that this rank holds, by name, complete.

        Raises:
            BudgetError: The system refuses the staging memory.
            StorageError: A read of this rank failed.
            RankFailedError: A neighbour failed; names it.
            BaseException: What `abort` was called with.
        """
        cpu_started = process_cpu_seconds()
        try:
            with limits_explained("load"), self._arena:
                self._stream_and_give_back()
            tensors = self._results.tensors()
        except BaseException as error:
            clear_frames(error)
            raise
        finally:
            self._results.forget()
            self._counters.add(cpu_seconds=process_cpu_seconds() - cpu_started)
        self._log()
        return tensors

    def abort(self, error: BaseException) -> None:
        """Ends the load from another thread; `run` raises `error`."""
        self._stop.set(error)

    def statistics(self) -> RankStatistics:
        """What this rank has done so far."""
        return RankStatistics.of(
            self._counters,
            self._storage.statistics(),
            rank=self._mine.rank,
            bytes_delivered=self._results.delivered_bytes,
            bytes_to_deliver=int(self._mine.bytes_to_fill.sum()),
            peak_staging_bytes=self._arena.peak_slots * self._arena.slot_bytes,
            memory_limit=max(self._options.memory_limit, self._arena.num_slots * self._arena.slot_bytes),
        )

    def _num_slots(self) -> int:
        """Slots within the limit, and no more than there are blocks that could need one."""
        num_reads = len(self._mine.reads)
        memory_limit, slot_bytes = self._options.memory_limit, self._mine.node_plan.limits.block_bytes
        if memory_limit == AS_MUCH_AS_USEFUL:
            return num_reads
        if 0 < memory_limit < slot_bytes:
            raise BudgetError(
                f"memory_limit of {exact_bytes(memory_limit)} of rank {self._mine.rank} cannot hold one block of "
                f"{exact_bytes(slot_bytes)}; plan with smaller blocks, or give that much"
            )
        return min(num_reads, max(1, memory_limit // slot_bytes))

    def _stream_and_give_back(self) -> None:
        with contextlib.ExitStack() as owned:
            owned.callback(self._neighbours.close)
            owned.callback(self._views.clear)
            # Ends first: its copies under way read what the others give back.
            owned.callback(self._close_device)
            try:
                self._stream()
            except BaseException as error:
                self._stop.set(error)
                # Raises what ended the load, rather than what came of it here, such as a storage that was closed.
                self._stop.check()
        self._stop.check()

    def _close_device(self) -> None:
        """What fails here is a failure of the load, unless there was one before."""
        try:
            self._device.close()
        except BaseException as error:
            self._stop.set(error)

    def _stream(self) -> None:
        self._activity.phase = "preparing memory for the tensors"
        with limits_explained("connect the ranks of this node"), self._counters.timed("connect"):
            self._device.adopt(self._arena.memory)
            self._neighbours.meet()
            for memory in self._neighbours.memories:
                self._device.adopt(memory)
            viewed = self._agree_on_views()
        self._activity.phase = "reading and copying tensors"
        with self._counters.timed("stream"):
            self._results.complete_empty()
            self._move_blocks(viewed)
            self._check_unchanged({*viewed, *self._reads.files_of_device})
        with self._counters.timed("finish"):
            with self._activity.waiting():
                self._arena.wait_idle()
            self._neighbours.finish()
        self._stop.check()

    def _agree_on_views(self) -> list[int]:
        """Files that all ranks of the node copy from a mapping; the node's first rank says which."""
        files = self._mine.files
        candidates = [] if self._device.wants_staging else self._mine.wanted_files()
        viewed = self._neighbours.share_numbers(
            lambda: [file for file in candidates if self._storage.is_resident(files[file].path)]
        )
        for file in viewed:
            view = self._storage.view(files[file].path, etag=files[file].etag)
            self._views[file] = np.frombuffer(view, dtype=np.uint8)
        return viewed

    def _check_unchanged(self, files: set[int]) -> None:
        """Mappings and devices show what is written to a file meanwhile; the storage's reads find that out themselves."""
        for file in (self._mine.files[number] for number in files):
            self._storage.check_unchanged(file.path, etag=file.etag)

    def _move_blocks(self, viewed: list[int]) -> None:
        reads, taken = self._mine.reads, self._mine.taken
        is_viewed = np.isin(self._mine.files_of(taken), viewed)
        is_announced = ~is_viewed & (self._mine.readers_of(taken) != self._mine.local_rank)
        own_reads = reads[~np.isin(self._mine.files_of(reads), viewed)].tolist()
        num_copies = int((is_viewed | is_announced).sum())
        self._inbox.open(taken[is_viewed].tolist(), int(is_announced.sum()))
        self._blocks_left.start(len(own_reads) + num_copies)
        num_copiers = min(num_copies, MAX_COPIERS, max(1, len(os.sched_getaffinity(0)) // len(self._mine.ranks)))
        num_readers = min(len(own_reads), self._options.concurrency)
        name = f"ray_streamer-{self._mine.rank}"
        readers = TaskThreads(f"{name}-read", num_readers, own_reads, self._read, self._stop)
        copiers = TaskThreads(f"{name}-copy", num_copiers, self._inbox, self._take, self._stop)
        with readers, copiers, self._activity.waiting():
            self._blocks_left.wait()

    def _read(self, number: int) -> None:
        """Reads one block of this rank and delivers it."""
        block = self._mine.block(number)
        with self._activity.working():
            is_in_place = self._reads.read_directly(block)
        if is_in_place:
            self._settle([(piece.result, piece.num_bytes) for piece in self._mine.pieces(number).plain])
            return
        with self._counters.timed("wait_seconds"):
            slot = self._arena.acquire()
        view = self._arena.view(slot, block.extent)
        try:
            with self._activity.working():
                self._reads.read_into(block, view)
            takers = self._mine.takers(number)
            self._arena.hold(slot, len(takers))
            self._neighbours.announce(number, slot, takers)
        except BaseException:
            self._arena.release(slot)
            raise
        self._deliver(number, np.frombuffer(view, dtype=np.uint8), lambda: self._arena.release(slot))

    def _take(self, task: Announced | int) -> None:
        """Copies this rank's pieces out of a neighbour's slot or out of a mapping."""
        if isinstance(task, Announced):
            view = self._neighbours.view(task.owner, task.slot, self._mine.block(task.block).extent)
            source = np.frombuffer(view, dtype=np.uint8)
            self._deliver(task.block, source, lambda: self._neighbours.release(task.owner, task.slot))
            return
        block = self._mine.block(task)
        # A file that was cut short by now would end the process instead.
        self._check_unchanged({block.file})
        source = self._views[block.file][block.extent.start : block.extent.stop]
        self._deliver(task, source, lambda: None, is_page_cache=True)

    def _deliver(
        self, number: int, source: NDArray[np.uint8], let_go: Callable[[], None], *, is_page_cache: bool = False
    ) -> None:
        """Copies what this rank takes from one block to its tensors; `let_go` gives the source back."""
        pieces = self._mine.pieces(number)
        delivered = [(piece.result, piece.num_bytes) for piece in pieces.plain]
        self._activity.begin()

        def done(error: BaseException | None) -> None:
            self._activity.end()
            let_go()
            if error is not None:
                self._stop.set(error)
                return
            try:
                self._settle(delivered)
            except BaseException as failure:  # a callback's; the device that calls this could do nothing with it
                self._stop.set(failure)

        with self._counters.timed("copy_seconds"):
            delivered += [
                (piece.result, self._strided.deliver(source, piece, self._results.result(piece.result)))
                for piece in pieces.strided
            ]
            if is_page_cache:
                self._counters.add(page_cache_bytes=sum(num_bytes for _, num_bytes in delivered))
            if pieces.plain:
                self._device.deliver(source, self._results.copies(pieces.plain), done)
            else:
                done(None)

    def _settle(self, delivered: list[tuple[int, int]]) -> None:
        """One block less to wait for."""
        self._results.settle(delivered)
        self._blocks_left.count()

    def _log(self) -> None:
        statistics = self.statistics()
        logger.info(
            "rank %d: %d bytes delivered, %d read in %d requests, %.3f s",
            statistics.rank,
            statistics.bytes_delivered,
            statistics.bytes_read,
            statistics.num_requests,
            sum(statistics.seconds.values()),
        )
