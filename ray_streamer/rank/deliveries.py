"""How do the bytes of a borrowed block reach this rank's tensors, and who hears of it? Copies, then the count of what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.collector import collector_paused
from ray_streamer.device.first_touch import take_spent_seconds
from ray_streamer.device.strided import StridedCopies
from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from ray_streamer.device.base import Device
    from ray_streamer.exchange.liveness import Activity
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.block_source import Loan
    from ray_streamer.rank.recorder import Recorder
    from ray_streamer.rank.results import Results
    from ray_streamer.staging.countdown import Countdown
    from ray_streamer.staging.stop import StopSignal


class Deliveries:
    """The copies of one load, out of blocks into results; safe to call from many threads.

    Args:
        mine: What this rank does.
        device: Copies.
        results: Where the bytes go.
        activity: Told of copies under way.
        recorder: Takes down when a block is taken, and when it has landed.
        blocks_left: Counted down by each block that has landed.
        stop: Set when a copy fails.
    """

    def __init__(
        self,
        mine: RankPlan,
        device: Device,
        results: Results,
        *,
        activity: Activity,
        recorder: Recorder,
        blocks_left: Countdown,
        stop: StopSignal,
    ) -> None:
        self._mine, self._device, self._results = mine, device, results
        self._strided = StridedCopies(results.device)
        self._activity, self._recorder = activity, recorder
        self._blocks_left, self._stop = blocks_left, stop

    def deliver(self, number: int, loan: Loan) -> None:
        """Copies what this rank takes from block `number`, and gives the block back; a device may do both later.

        Raises:
            BaseException: A copy failed at once, or what is called for a complete result did.
        """
        with collector_paused():  # a block may hold thousands of tensors
            pieces = self._mine.pieces(number)
            delivered = [(piece.result, piece.num_bytes) for piece in pieces.plain]
            copies = self._results.copies(pieces.plain)
        taken_bytes = sum(num_bytes for _, num_bytes in delivered)
        # `done` must not close over the block: an error keeps the closure, and with it the arena's memory.
        way, data, give_back = loan
        self._recorder.came(way, number)
        if data is None:
            self._note_landed(number, delivered, taken_bytes)
            give_back()
            self._count(delivered)
            return
        self._recorder.mark(Step.TAKEN, number)
        self._activity.begin()

        def done(error: BaseException | None) -> None:
            self._activity.end()
            if error is None:
                self._note_landed(number, delivered, taken_bytes)
            give_back()
            if error is not None:
                self._stop.set(error)
                return
            try:
                self._count(delivered)
            except BaseException as failure:  # a callback's; the device that calls this could do nothing with it
                self._stop.set(failure)

        for piece in pieces.strided:
            num_bytes = self._strided.deliver(data, piece, self._results.result(piece.result))
            delivered.append((piece.result, num_bytes))
            taken_bytes += piece.move.source_bytes(num_bytes)
        if pieces.plain:
            self._device.deliver(data, copies, done)
        else:
            done(None)

    def _note_landed(self, number: int, delivered: list[tuple[int, int]], taken_bytes: int) -> None:
        """Called before the block is given back: whoever then takes its slot is later on the time axis."""
        # A device that copies later does so in a thread of its own, and touches no memory of the host.
        touched = take_spent_seconds()
        landed_bytes = sum(num_bytes for _, num_bytes in delivered)
        self._recorder.landed(number, landed_bytes, taken_bytes=taken_bytes, touch_seconds=touched)

    def _count(self, delivered: list[tuple[int, int]]) -> None:
        """One block less to wait for."""
        self._results.count_delivered(delivered)
        self._blocks_left.count()
