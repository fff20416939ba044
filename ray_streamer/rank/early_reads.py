"""What is read before the tensors exist? The first blocks of this rank, as many as its arena has slots.

    torch is imported, the device comes up     reader threads fill slots, and offer them to the neighbours
    tensors are there                          no further block is begun; the rank's own readers take what was read from here

So a rank that waits for torch holds nothing up: what its neighbours want of its first blocks is theirs already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.staging.threads import TaskThreads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.planning.rank_plan import Block, RankPlan
    from ray_streamer.rank.block_reads import StagedReads
    from ray_streamer.rank.block_source import Loan
    from ray_streamer.staging.stop import StopSignal


class EarlyReads:
    """Blocks that lie in slots before they are asked for; see `BlockSource`.

    Args:
        mine: What this rank does.
        staged: Reads a block into a slot.
        stop: Of the load.
    """

    def __init__(self, mine: RankPlan, staged: StagedReads, stop: StopSignal) -> None:
        self._mine, self._staged, self._stop = mine, staged, stop
        self._changed = stop.condition()
        self._is_over = False
        self._begun: set[int] = set()
        self._loans: dict[int, Loan] = {}
        self._threads: TaskThreads[int] | None = None

    def begin(self, numbers: Sequence[int], *, num_threads: int) -> None:
        """Begins to read blocks; none of them may wait for a slot.

        Args:
            numbers: Of blocks that this rank reads, no more than there are slots.
            num_threads: Reads in flight.

        Raises:
            BudgetError: The system refuses a thread.
        """
        name = f"ray_streamer-{self._mine.rank}-early"
        self._threads = TaskThreads(
            name, min(num_threads, len(numbers)), self._begin_each(numbers), self._read, self._stop
        )
        self._threads.__enter__()

    def end(self) -> None:
        """Begins no further block; those under way can be asked for."""
        with self._changed:
            self._is_over = True

    def borrow(self, block: Block) -> Loan | None:
        """See `BlockSource.borrow`; waits for a block that is under way. Call it after `end`."""
        with self._changed:
            if block.number not in self._begun:
                return None
            while block.number not in self._loans:
                self._stop.check()
                self._changed.wait()
            self._begun.remove(block.number)
            return self._loans.pop(block.number)

    def verify(self) -> None:
        """See `BlockSource.verify`; the storage compares with each read."""

    def close(self) -> None:
        """Waits for reads under way and lets go of what nobody took."""
        self.end()
        if self._threads is not None:
            self._threads.__exit__(None, None, None)
        self._loans.clear()

    def _begin_each(self, numbers: Sequence[int]) -> Iterator[int]:
        for number in numbers:
            with self._changed:
                if self._is_over:
                    return
                self._begun.add(number)
            yield number

    def _read(self, number: int) -> None:
        loan = self._staged.borrow(self._mine.block(number))
        with self._changed:
            self._loans[number] = loan
            self._changed.notify_all()
