"""How do the ranks' parts of a trace come together? Each node's clock compared once, each rank asked for what it took down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.cluster.clocks import measure_offset
from ray_streamer.report.trace import LoadTrace, epoch_of_this_clock

if TYPE_CHECKING:
    from ray_streamer.cluster.clocks import ClockReading
    from ray_streamer.cluster.group import WorkerGroup
    from ray_streamer.cluster.phases import Phases
    from ray_streamer.report.trace import ClockOffset


def collect_trace(group: WorkerGroup, uri: str, phases: Phases) -> LoadTrace:
    """The load of a group whose ranks have their tensors, on the time axis of this process.

    Args:
        group: Its workers are `LoadWorker`s.
        uri: What was loaded.
        phases: The clock of the report.

    Raises:
        RankFailedError: A rank died.
        ClusterError: The group is shut down.
    """
    offsets = {rank: offset for ranks in group.nodes for offset in [_offset_of(group, ranks[0])] for rank in ranks}
    return LoadTrace(
        uri=uri,
        phases=phases.spans(),
        ranks=tuple(group.call("trace", keep_on_failure=True)),
        offsets=tuple(offsets[rank] for rank in range(group.num_ranks)),
        epoch_seconds=epoch_of_this_clock(),
    )


def _offset_of(group: WorkerGroup, rank: int) -> ClockOffset:
    def ask() -> ClockReading:
        return group.call("clock", ranks=[rank], keep_on_failure=True)[0]

    return measure_offset(ask)
