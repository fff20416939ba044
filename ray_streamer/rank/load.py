"""How do a rank's tensors get their bytes? Each block is borrowed from the place that has it, copied to its tensors, and given back.

    reader threads   this rank's blocks, in plan order  ┐
                                                        ├─> borrow from a `BlockSource` ─> `Deliveries` ─> tensors
    copier threads   blocks that neighbours offer, and  ┘
                     blocks of mapped files

Where torch is still being imported, `EarlyReads` fills the arena meanwhile: tensors are made as soon as the device is there.

A rank is done when it has all its bytes, its slots are free again and its neighbours say the same; until then nothing is
handed out.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.errors import BudgetError
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, slots_within, useful_slots
from ray_streamer.process_limits import limits_explained
from ray_streamer.rank.block_reads import BlockReads, CachedReads, DirectReads, StagedReads
from ray_streamer.rank.conditions import RankConditions, max_copiers
from ray_streamer.rank.deliveries import Deliveries
from ray_streamer.rank.device_start import DeviceStart
from ray_streamer.rank.early_reads import EarlyReads
from ray_streamer.rank.inbox import Inbox
from ray_streamer.rank.mappings import Mappings
from ray_streamer.rank.neighbourhood import Neighbourhood
from ray_streamer.rank.recorder import Recorder
from ray_streamer.rank.results import Results
from ray_streamer.rank.statistics import RankStatistics
from ray_streamer.staging.arena import Arena
from ray_streamer.staging.countdown import Countdown
from ray_streamer.staging.error_frames import clear_frames
from ray_streamer.staging.stop import StopSignal
from ray_streamer.staging.threads import TaskThreads
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ray_streamer.device.base import Device
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.planning.rank_plan import Block, RankPlan
    from ray_streamer.rank.block_source import BlockSource, Loan
    from ray_streamer.rank.recorder import Spans
    from ray_streamer.rank.results import OnComplete
    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.storage.base import Storage

logger = logging.getLogger(__name__)


class _Landing(NamedTuple):
    """Where blocks land, once the device is there.

    Attributes:
        device: Where the tensors are.
        results: The tensors.
        sources: The places that are asked for a block, in this order; the last one has every block.
        deliveries: Copies blocks to the tensors.
    """

    device: Device
    results: Results
    sources: tuple[BlockSource, ...]
    deliveries: Deliveries


class RankLoad:
    """One load of one rank; make it, `run` it once, ask it for statistics at any time.

    Args:
        plan: What this rank does.
        storage: Open on the plan's checkpoint. A load that fails closes it: that wakes reads which wait for a network.
        device: Where the tensors go; it may still be coming up. Where it is there, tensors are made at once, by the caller's
            thread.
        session: Of this node's ranks, which have met.
        concurrency: Reads in flight.
        memory_limit: Staging bytes; -1 for as much as the plan can use.
        out: Tensors of the caller, filled in place; see `Results`.
        on_complete: Called with names and tensors as these complete, from several threads; its error ends the load.

    Raises:
        BudgetError: The memory limit cannot hold one block.
        DeviceError: `out` does not fit.
    """

    def __init__(
        self,
        plan: RankPlan,
        storage: Storage,
        device: Device | DeviceStart,
        session: NodeSession,
        *,
        concurrency: int,
        memory_limit: int,
        out: Mapping[str, torch.Tensor] | None = None,
        on_complete: OnComplete | None = None,
    ) -> None:
        self._mine, self._storage, self._node = plan, storage, session.place.node
        self._concurrency, self._memory_limit = concurrency, memory_limit
        self._device_start = device if isinstance(device, DeviceStart) else DeviceStart.of(device)
        self._out, self._on_complete = out, on_complete
        self._stop = StopSignal()
        self._inbox = Inbox(self._stop)
        self._slots_limit = self._share_memory()
        self._arena = Arena(self._num_slots(), plan.node_plan.limits.block_bytes, self._stop)
        self._recorder = Recorder(len(plan.node_plan.blocks))
        self._neighbours = Neighbourhood(
            plan, session, inbox=self._inbox, recorder=self._recorder, arena=self._arena, stop=self._stop
        )
        self._activity = session.activity
        self._blocks_left = Countdown(self._stop)
        self._mappings = Mappings(plan, storage)
        self._reads = BlockReads(plan, storage, activity=self._activity, recorder=self._recorder)
        self._staged = StagedReads(plan, self._arena, self._neighbours, self._reads, recorder=self._recorder)
        self._early = EarlyReads(plan, self._staged, self._stop)
        opened = self._device_start.opened
        self._landing = None if opened is None else self._prepare_landing(opened)
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
        try:
            with self._recorder.cpu_counted(), limits_explained("load"), self._arena:
                self._stream_and_give_back()
            tensors = self._landed.results.tensors()
        except BaseException as error:
            clear_frames(error)
            raise
        finally:
            self._out = None
            if self._landing is not None:
                self._landing.results.forget()
        self._log()
        return tensors

    def abort(self, error: BaseException) -> None:
        """Ends the load from another thread; `run` raises `error`."""
        self._stop.set(error)

    def statistics(self) -> RankStatistics:
        """What this rank has done so far."""
        storage = self._storage.statistics()
        return RankStatistics.of(
            self._recorder,
            self._mine,
            storage,
            peak_staging_bytes=self._arena.peak_slots * self._arena.slot_bytes + storage.scratch_bytes,
            memory_limit=max(self._memory_limit, self._arena.num_slots * self._arena.slot_bytes),
        )

    @property
    def staging_bytes(self) -> int:
        """Staging memory that holds blocks now."""
        return self._arena.num_used * self._arena.slot_bytes

    def spans(self) -> Spans:
        """When each block took each step so far."""
        return self._recorder.spans()

    def trace(self) -> RankTrace:
        """The same, with what the blocks are, for whoever draws all ranks."""
        from ray_streamer.rank.trace import RankTrace

        conditions = RankConditions.of(self._concurrency, self._arena, self._storage, len(self._mine.ranks))
        return RankTrace.of(
            self._mine,
            self.spans(),
            node=self._node,
            conditions=conditions,
            incidents=self._storage.incidents(),
        )

    def _share_memory(self) -> int:
        """What of the memory limit is the slots': at most a quarter of it is the storage's, which leaves one slot in any case."""
        memory_limit, slot_bytes = self._memory_limit, self._mine.node_plan.limits.block_bytes
        if memory_limit == AS_MUCH_AS_USEFUL:
            return memory_limit
        if 0 < memory_limit < slot_bytes:
            raise BudgetError(
                f"memory_limit of {exact_bytes(memory_limit)} of rank {self._mine.rank} cannot hold one block of "
                f"{exact_bytes(slot_bytes)}; plan with smaller blocks, or give that much"
            )
        return memory_limit - self._storage.limit_scratch(max(0, min(memory_limit // 4, memory_limit - slot_bytes)))

    def _num_slots(self) -> int:
        """Slots within the limit, and no more than there are blocks that could need one: all of them while torch is imported."""
        num_reads = len(self._mine.reads)
        if self._device_start.opened is not None:
            return min(num_reads, self._num_useful_slots())
        slot_bytes = self._mine.node_plan.limits.block_bytes
        return slots_within(self._slots_limit, block_bytes=slot_bytes, most=num_reads)

    def _num_useful_slots(self) -> int:
        return useful_slots(
            memory_limit=self._slots_limit,
            block_bytes=self._mine.node_plan.limits.block_bytes,
            concurrency=self._concurrency,
        )

    def _prepare_landing(self, device: Device) -> _Landing:
        """Makes the tensors."""
        results = Results(self._mine, device, out=self._out, on_complete=self._on_complete)
        direct = DirectReads(self._mine, self._storage, device, results, self._reads)
        cached = CachedReads(
            self._mine,
            self._storage,
            device,
            results,
            self._mappings,
            activity=self._activity,
            recorder=self._recorder,
        )
        deliveries = Deliveries(
            self._mine,
            device,
            results,
            activity=self._activity,
            recorder=self._recorder,
            blocks_left=self._blocks_left,
            stop=self._stop,
        )
        sources = (self._early, cached, self._mappings, self._neighbours, direct, self._staged)
        return _Landing(device, results, sources, deliveries)

    @property
    def _landed(self) -> _Landing:
        assert self._landing is not None
        return self._landing

    def _stream_and_give_back(self) -> None:
        with contextlib.ExitStack() as owned:
            owned.callback(self._neighbours.close)
            owned.callback(self._mappings.close)
            owned.callback(self._early.close)
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
            if self._landing is not None:
                self._landing.device.close()
        except BaseException as error:
            self._stop.set(error)

    def _stream(self) -> None:
        self._activity.phase = "preparing memory for the tensors"
        with limits_explained("connect the ranks of this node"), self._recorder.phase("connect"):
            self._neighbours.exchange_arenas()
            self._mappings.open(self._neighbours.share_numbers, is_wanted=not self._device_start.wants_staging)
        landing = self._landing
        if landing is None:
            with self._recorder.phase("device"):
                landing = self._landing = self._read_until_there()
        for memory in (self._arena.memory, *self._neighbours.memories):
            landing.device.pin(memory)
        self._activity.phase = "reading and copying tensors"
        with self._recorder.phase("stream"):
            landing.results.complete_empty()
            self._move_blocks()
            for source in landing.sources:
                source.verify()
        with self._recorder.phase("finish"):
            with self._activity.waiting():
                self._arena.wait_idle()
            self._neighbours.finish()
        self._stop.check()

    def _read_until_there(self) -> _Landing:
        """Reads as many blocks as there are slots while the device comes up."""
        numbers = self._own_reads()[: self._arena.num_slots]
        self._early.begin(numbers, num_threads=self._concurrency)
        landing = self._prepare_landing(self._device_start.wait(self._stop, self._activity))
        self._early.end()
        self._arena.limit_touched(self._num_useful_slots())
        return landing

    def _own_reads(self) -> list[int]:
        """Blocks that this rank reads, and that lie in no mapped file."""
        return self._mine.reads[~self._mappings.have(self._mine.reads)].tolist()

    def _move_blocks(self) -> None:
        mine, mappings = self._mine, self._mappings
        is_mapped = mappings.have(mine.taken)
        is_offered = ~is_mapped & (mine.readers_of(mine.taken) != mine.local_rank)
        own_reads = self._own_reads()
        num_copies = int((is_mapped | is_offered).sum())
        self._inbox.open(mine.taken[is_mapped].tolist(), int(is_offered.sum()))
        self._blocks_left.start(len(own_reads) + num_copies)
        num_copiers = min(num_copies, max_copiers(len(mine.ranks)))
        num_readers = min(len(own_reads), self._concurrency)
        name = f"ray_streamer-{mine.rank}"
        readers = TaskThreads(f"{name}-read", num_readers, own_reads, self._move, self._stop)
        copiers = TaskThreads(f"{name}-copy", num_copiers, self._inbox, self._move, self._stop)
        with readers, copiers, self._activity.waiting():
            self._blocks_left.wait()

    def _move(self, number: int) -> None:
        """Brings what this rank takes of one block to its tensors."""
        self._landed.deliveries.deliver(number, self._borrow(self._mine.block(number)))

    def _borrow(self, block: Block) -> Loan:
        """The block, from the first source that has it."""
        for source in self._landed.sources:
            loan = source.borrow(block)
            if loan is not None:
                return loan
        raise AssertionError(f"no source has block {block}")

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
