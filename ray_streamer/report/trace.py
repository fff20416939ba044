"""How is every block's life on all ranks kept, so that people can look at it? One file that ui.perfetto.dev and chrome://tracing open.

All ranks stand on one time axis: microseconds since 1970 by the driver's clock, as in the file that `ray timeline` writes. The
monotonic clocks of one machine are one clock. That of another machine is compared with the driver's, and the file says how
well (`otherData`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_streamer.report.output_file import open_output
from ray_streamer.report.trace_events import DrawnRank, Process, node_events

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.report.trace_events import Event


class ClockOffset(NamedTuple):
    """How a machine's monotonic clock compares with the driver's.

    Attributes:
        seconds: That clock minus the driver's.
        error_seconds: How wrong this may be at most; 0 on the driver's own machine.
    """

    seconds: float
    error_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadTrace:
    """A finished load on the time axis.

    Attributes:
        uri: What was loaded.
        phases: Of the driver: names with two readings of its clock; none where there is no driver.
        ranks: Of all nodes.
        offsets: The clock of each of `ranks`.
        epoch_seconds: Seconds since 1970 when the driver's clock showed 0.
    """

    uri: str
    phases: tuple[tuple[str, float, float], ...]
    ranks: tuple[RankTrace, ...]
    offsets: tuple[ClockOffset, ...]
    epoch_seconds: float

    def events(self) -> Iterator[Event]:
        """Every event, in no particular order."""
        if self.phases:
            driver = Process(1 + max((trace.rank for trace in self.ranks), default=-1), self.epoch_seconds)
            yield from driver.names("driver", sort_index=-1)
            yield from driver.phases(self.phases)
        nodes: dict[tuple[int, ...], list[DrawnRank]] = {}
        for trace, offset in zip(self.ranks, self.offsets, strict=True):
            drawn = DrawnRank.of(trace, epoch_seconds=self.epoch_seconds - offset.seconds)
            nodes.setdefault(trace.ranks, []).append(drawn)
            yield from drawn.events()
        yield from chain.from_iterable(node_events(number, ranks) for number, ranks in enumerate(nodes.values()))

    def about(self) -> dict[str, Any]:
        """What was loaded, and how well the clocks agree."""
        errors = {
            trace.node: round(offset.error_seconds * 1e6)
            for trace, offset in zip(self.ranks, self.offsets, strict=True)
        }
        return {"uri": self.uri, "num_ranks": len(self.ranks), "clock_error_microseconds": errors}

    def write(self, path: Path) -> None:
        """Writes the file, event by event.

        Raises:
            SettingsError: It cannot be written.
        """
        with open_output(path) as stream:
            stream.write(f'{{"otherData": {json.dumps(self.about())}, "displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate(self.events()):
                stream.write((",\n" if number else "\n") + json.dumps(event))
            stream.write("\n]}\n")


def epoch_of_this_clock() -> float:
    """Seconds since 1970 when the monotonic clock of this machine showed 0, by its own date."""
    return time.time() - time.perf_counter()
