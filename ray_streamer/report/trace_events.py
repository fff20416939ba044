"""How does a load look on a time axis? As events of Chrome's trace format: one process per rank, lanes of reads and of copies.

    phases       connect, stream, finish
    reads        a block from when it is taken up until it is there and offered; in it the wait for a slot, the wait for the
                 first byte, and the rest
    copies       a block's way into this rank's tensors
    incidents    retries, answers to slow down, requests held back, hedged requests, late bodies cut: marks in the lane of the phases
    slots        how many slots of the arena are in use, until the last rank of the node has its part

An arrow leads from a read to the copies that other ranks of the node make of the block. Format: "Trace Event Format" of the Chromium
project, as ui.perfetto.dev reads it; times in microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.recorder import Step
from ray_streamer.report.slots import slots_held
from ray_streamer.report.trace_lanes import Placed, place_copies, place_reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.rank.trace import RankTrace

Event = dict[str, Any]

_READS = 100_001
_COPIES = 200_001
"""First lanes of reads and copies. Lanes are threads of the format: one with the number of its process is the main thread, shown first,
as which viewers also take number 0."""

_PARTS_OF_A_READ = (
    ("wait for a slot", Step.QUEUED, Step.ASKED),
    ("wait for the first byte", Step.ASKED, Step.FIRST_BYTE),
    ("receive", Step.FIRST_BYTE, Step.LAST_BYTE),
)


class Process(NamedTuple):
    """A process on the time axis.

    Attributes:
        number: Of the process.
        epoch_seconds: Seconds since 1970 when its monotonic clock showed 0.
    """

    number: int
    epoch_seconds: float

    def at(self, seconds: float) -> int:
        """The place of a reading of its clock.

        A whole number: with fractions, dates have more digits than viewers keep, and what follows in a lane seems to overlap.
        """
        return round((seconds + self.epoch_seconds) * 1e6)

    @property
    def main_lane(self) -> int:
        """The lane of its phases."""
        return self.number

    def names(self, name: str, *, sort_index: int) -> Iterator[Event]:
        """Its name, and where it is shown."""
        yield {"ph": "M", "pid": self.number, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": self.number, "name": "process_sort_index", "args": {"sort_index": sort_index}}

    def lane(self, lane: int, name: str) -> Iterator[Event]:
        """The name of a lane, which are shown by number."""
        yield {"ph": "M", "pid": self.number, "tid": lane, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": self.number, "tid": lane, "name": "thread_sort_index", "args": {"sort_index": lane}}

    def lasted(self, lane: int, name: str, start: float, stop: float, category: str, **more: Any) -> Event:
        """Something that lasted from one reading of the clock to another."""
        at = self.at(start)
        duration = max(0, self.at(stop) - at)
        return {
            "ph": "X",
            "pid": self.number,
            "tid": lane,
            "ts": at,
            "dur": duration,
            "name": name,
            "cat": category,
        } | more

    def mark(self, name: str, seconds: float) -> Event:
        """Something that lasted no time, in the lane of the phases."""
        mark = {"ph": "i", "pid": self.number, "tid": self.main_lane, "ts": self.at(seconds), "s": "t"}
        return mark | {"name": name, "cat": "incident"}

    def phases(self, phases: Sequence[tuple[str, float, float]]) -> Iterator[Event]:
        """A lane of phases, as names with two readings of the clock."""
        yield from self.lane(self.main_lane, "phases")
        for name, start, stop in phases:
            yield self.lasted(self.main_lane, name, start, stop, "phase")


class DrawnRank(NamedTuple):
    """One rank, and where its blocks are drawn."""

    trace: RankTrace
    process: Process
    reads: Placed
    copies: Placed

    @classmethod
    def of(cls, trace: RankTrace, *, epoch_seconds: float) -> Self:
        """Places the blocks of a rank."""
        return cls(trace, Process(trace.rank, epoch_seconds), place_reads(trace), place_copies(trace))

    def events(self) -> Iterator[Event]:
        """What happened on this rank alone."""
        trace, process = self.trace, self.process
        yield from process.names(f"rank {trace.rank} on {trace.node}", sort_index=trace.rank)
        yield from process.phases([phase for phase in trace.spans.phases if phase.stop])
        for incident in trace.incidents:
            yield process.mark(incident.kind, incident.seconds)
        for name, first, placed in (("reads", _READS, self.reads), ("copies", _COPIES, self.copies)):
            for lane in range(placed.num_lanes):
                yield from process.lane(first + lane, f"{name} {lane + 1}")
        for row, lane, start, stop in zip(*self.reads, strict=True):
            yield self._block(row, _READS + lane, start, stop, "read")
            yield from self._parts(row, _READS + lane)
        for row, lane, start, stop in zip(*self.copies, strict=True):
            yield self._block(row, _COPIES + lane, start, stop, "copy")

    def _block(self, row: int, lane: int, start: float, stop: float, category: str) -> Event:
        trace = self.trace
        about = {
            "file": trace.files[trace.file_ids[row]],
            "start": int(trace.starts[row]),
            "stop": int(trace.stops[row]),
            "way": Way(int(trace.spans.ways[row])).name.lower() if trace.spans.ways[row] else "none",
            "bytes into this rank's tensors": int(trace.spans.landed_bytes[row]),
        }
        return self.process.lasted(lane, f"block {trace.numbers[row]}", start, stop, category, args=about)

    def _parts(self, row: int, lane: int) -> Iterator[Event]:
        times = self.trace.spans.times
        for name, first, last in _PARTS_OF_A_READ:
            start, stop = float(times[first, row]), float(times[last, row])
            if start and stop:
                yield self.process.lasted(lane, name, start, stop, "read")


def node_events(node: int, ranks: Sequence[DrawnRank]) -> Iterator[Event]:
    """What happened between the ranks of a node: arrows from reads to the others' copies, and slots in use.

    Args:
        node: Its number, equal for no two nodes.
        ranks: All ranks of it.
    """
    readers = {drawn.trace.rank: drawn for drawn in ranks}
    read_lanes = {
        drawn.trace.rank: dict(zip(drawn.trace.numbers[drawn.reads.rows].tolist(), drawn.reads.lanes, strict=True))
        for drawn in ranks
    }
    for consumer in ranks:
        trace = consumer.trace
        for row, lane, start, _ in zip(*consumer.copies, strict=True):
            if trace.spans.ways[row] != Way.OFFERED:
                continue
            reader, number = readers.get(int(trace.readers[row])), int(trace.numbers[row])
            if reader is None:  # restarted since then
                continue
            arrow = {
                "id": (node << 48) | (number << 16) | trace.ranks.index(trace.rank),
                "name": "offered",
                "cat": "exchange",
            }
            announced = reader.trace.spans.times[Step.ANNOUNCED, reader.trace.numbers.searchsorted(number)]
            yield _end_of_arrow("s", reader.process, _READS + read_lanes[reader.trace.rank][number], announced) | arrow
            yield _end_of_arrow("f", consumer.process, _COPIES + lane, start) | arrow | {"bp": "e"}
    for drawn in ranks:
        yield from _slots_in_use(drawn, ranks)


def _end_of_arrow(kind: str, process: Process, lane: int, seconds: float) -> Event:
    return {"ph": kind, "pid": process.number, "tid": lane, "ts": process.at(float(seconds))}


def _slots_in_use(drawn: DrawnRank, ranks: Sequence[DrawnRank]) -> Iterator[Event]:
    """A counter of one rank's slots."""
    trace, at = drawn.trace, drawn.process.at
    held = slots_held(trace, [each.trace for each in ranks])
    changes = [(at(seconds), 1) for seconds in held.taken.tolist()]
    changes += [(at(seconds), -1) for seconds in held.free.tolist()]
    in_use = 0
    for moment, change in sorted(changes):
        in_use += change
        yield {"ph": "C", "pid": trace.rank, "ts": moment, "name": "slots in use", "args": {"slots": in_use}}
