"""How long did each read and copy of a node take? The traces of its ranks, turned from readings of a clock into lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.conditions import READS_OF_A_DISK
from ray_streamer.rank.recorder import Step
from ray_streamer.report.verdict.losses import losses_of
from ray_streamer.report.verdict.model import CopyModel, NodeModel, RankModel, Read
from ray_streamer.report.verdict.rates import Rates, Receipts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.rank.trace import RankTrace

_FASTEST_NETWORK = 40e9
"""Bytes per second of one stream. Where reads are faster, the storage reports the first byte when it has the last one."""

_MAX_TASKS = 8000
"""Reads and copies that are replayed; a replay of so many takes about a tenth of a second."""

_RUN_BLOCKS = 16
"""A longer load is replayed in runs of so many blocks, so that blocks that lie side by side still do."""


class Observed(NamedTuple):
    """One node's load, as it was and as it can be replayed.

    Attributes:
        model: What it needed.
        measured_seconds: From the first moment of its ranks until the last byte was in a tensor.
        rates: What the storage gave.
        first_byte_seconds: Of each read; empty when the storage tells of none.
    """

    model: NodeModel
    measured_seconds: float
    rates: Rates
    first_byte_seconds: NDArray[np.float64]


def observe_node(traces: Sequence[RankTrace], *, max_bandwidth: float | None = None) -> Observed | None:
    """The load of one node; None when nothing was read or copied.

    Args:
        traces: Of ranks of one node, in local order.
        max_bandwidth: Bytes per second that the node was held to by its user.
    """
    origin = min((_phase(trace, "device", "stream").start for trace in traces), default=0.0)
    landed = max((float(trace.spans.times[Step.LANDED].max(initial=0.0)) for trace in traces), default=0.0)
    if landed <= origin:
        return None
    is_told = tells_first_byte(traces)
    receipts = Receipts(*_receipts(traces, tells_first_byte=is_told))
    is_busy = all(trace.conditions.is_disk and trace.conditions.concurrency >= READS_OF_A_DISK for trace in traces)
    rates = receipts.rates(max_bandwidth=max_bandwidth, is_shared=is_busy)
    thinning = _thinning(traces)
    node = _Node(origin, _copies_by_block(traces, thinning), thinning, is_told)
    rows = [_own_reads(trace) for trace in traces]
    work = np.split(receipts.work_bytes(rates), np.cumsum([len(own) for own in rows])[:-1])
    model = NodeModel(
        ranks=tuple(_rank_model(node, trace, local, rows[local], work[local]) for local, trace in enumerate(traces)),
        stream_rate=rates.stream,
        node_rate=rates.node,
        block_bytes=traces[0].conditions.block_bytes,
        thinning=thinning,
    )
    waits = [
        (trace.spans.times[Step.FIRST_BYTE] - trace.spans.times[Step.ASKED])[own]
        for trace, own in zip(traces, rows, strict=True)
    ]
    return Observed(model, landed - origin, rates, np.concatenate(waits) if is_told else np.zeros(0))


class _Node(NamedTuple):
    """What all ranks of the node have in common.

    Attributes:
        origin: The first moment of its ranks.
        copies: See `_copies_by_block`.
        thinning: See `_thinning`.
        tells_first_byte: See `tells_first_byte`.
    """

    origin: float
    copies: dict[int, list[CopyModel]]
    thinning: int
    tells_first_byte: bool


def _rank_model(
    node: _Node, trace: RankTrace, local: int, rows: NDArray[np.int64], work: NDArray[np.float64]
) -> RankModel:
    """One rank; `rows` are its reads, and `work` what each of them asked of the storage."""
    return RankModel(
        rank=trace.rank,
        begin_seconds=_phase(trace, "device", "stream").start - node.origin,
        ready_seconds=_phase(trace, "stream").start - node.origin,
        num_readers=trace.conditions.concurrency,
        num_slots=trace.conditions.num_slots,
        num_copiers=trace.conditions.num_copiers,
        reads=_reads(node, trace, local, rows, work),
        mapped=_mapped(trace, local, node.thinning),
    )


class _Span(NamedTuple):
    start: float
    stop: float


def _phase(trace: RankTrace, *names: str) -> _Span:
    """The first phase of the load that has one of these names."""
    for phase in trace.spans.phases:
        if phase.name in names:
            return _Span(phase.start, phase.stop)
    times = trace.spans.times
    first = float(times[times > 0].min(initial=np.inf))
    return _Span(first, first)


def _own_reads(trace: RankTrace) -> NDArray[np.int64]:
    """Rows of the blocks that the rank read, in the order of the plan."""
    times = trace.spans.times
    return np.flatnonzero((times[Step.ASKED] > 0) & (times[Step.LAST_BYTE] > 0) & (times[Step.LANDED] > 0))


def tells_first_byte(traces: Sequence[RankTrace]) -> bool:
    """Whether the storage of these ranks reports first bytes when they come, and not together with the last ones."""
    rates: list[float] = []
    for trace in traces:
        rows = _own_reads(trace)
        seconds = (trace.spans.times[Step.LAST_BYTE] - trace.spans.times[Step.FIRST_BYTE])[rows]
        rates += ((trace.stops - trace.starts)[rows] / np.maximum(seconds, 1e-9)).tolist()
    return bool(rates) and float(np.median(rates)) < _FASTEST_NETWORK


def _thinning(traces: Sequence[RankTrace]) -> int:
    """How many blocks each one stands for that is replayed: as few as can be, with several reads left to each reader."""
    num_tasks = sum(len(trace.numbers) for trace in traces)
    num_reads = sum(len(_own_reads(trace)) for trace in traces)
    num_readers = sum(trace.conditions.concurrency for trace in traces)
    return max(1, min(-(-num_tasks // _MAX_TASKS), num_reads // (4 * num_readers) or 1))


def _is_replayed(numbers: NDArray[np.int64], thinning: int) -> NDArray[np.bool_]:
    return numbers // _RUN_BLOCKS % thinning == 0


def _receipts(
    traces: Sequence[RankTrace], *, tells_first_byte: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """First byte, last byte and size of every read of the node."""
    first = Step.FIRST_BYTE if tells_first_byte else Step.ASKED
    rows = [_own_reads(trace) for trace in traces]
    each = list(zip(traces, rows, strict=True))
    return (
        np.concatenate([trace.spans.times[first, own] for trace, own in each]),
        np.concatenate([trace.spans.times[Step.LAST_BYTE, own] for trace, own in each]),
        np.concatenate([(trace.stops - trace.starts)[own] for trace, own in each]),
    )


def _copies_by_block(traces: Sequence[RankTrace], thinning: int) -> dict[int, list[CopyModel]]:
    """What ranks copied out of the blocks of others, by number of the block."""
    announced: dict[int, float] = {}
    for trace in traces:
        rows = _own_reads(trace)
        announced.update(
            zip(trace.numbers[rows].tolist(), trace.spans.times[Step.ANNOUNCED, rows].tolist(), strict=True)
        )
    copies: dict[int, list[CopyModel]] = {}
    for local, trace in enumerate(traces):
        times = trace.spans.times
        is_offered = (trace.spans.ways == Way.OFFERED) & (times[Step.LANDED] > 0)
        rows = np.flatnonzero(is_offered & _is_replayed(trace.numbers, thinning))
        columns = (
            trace.numbers[rows],
            times[Step.ANNOUNCED, rows],
            (times[Step.LANDED] - times[Step.TAKEN])[rows],
            trace.spans.touch_seconds[rows],
        )
        for number, heard, seconds, touched in zip(*(column.tolist() for column in columns), strict=True):
            delay = max(0.0, heard - announced[number]) if announced.get(number) and heard else 0.0
            copies.setdefault(number, []).append(CopyModel(local, seconds, touched, delay))
    return copies


def _mapped(trace: RankTrace, local: int, thinning: int) -> tuple[CopyModel, ...]:
    times = trace.spans.times
    all_rows = np.flatnonzero((trace.spans.ways == Way.MAPPED) & (times[Step.LANDED] > 0))
    kept = _is_replayed(trace.numbers[all_rows], thinning)
    rows = all_rows[kept]
    seconds = ((times[Step.LANDED] - times[Step.TAKEN])[all_rows] + _seconds_between_copies(trace, all_rows))[kept]
    touched = trace.spans.touch_seconds[rows]
    return tuple(CopyModel(local, *each) for each in zip(seconds.tolist(), touched.tolist(), strict=True))


def _seconds_between_copies(trace: RankTrace, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """What passed before each of a rank's copies out of mapped files, since a copier was free.

    Where neighbours offer blocks, these are what copiers do meanwhile.
    """
    if (trace.spans.ways == Way.OFFERED).any() or not len(rows):
        return np.zeros(len(rows))
    taken, landed = (trace.spans.times[step, rows] for step in (Step.TAKEN, Step.LANDED))
    num_first = min(len(rows), trace.conditions.num_copiers)
    free = np.concatenate([np.full(num_first, _phase(trace, "stream").start), np.sort(landed)[: len(rows) - num_first]])
    order = np.argsort(taken, kind="stable")
    between = np.zeros(len(rows))
    between[order] = np.maximum(0.0, taken[order] - free)
    return between


def _reads(
    node: _Node, trace: RankTrace, local: int, rows: NDArray[np.int64], work: NDArray[np.float64]
) -> tuple[Read, ...]:
    columns = _read_columns(trace, rows, work, tells_first_byte=node.tells_first_byte)
    kept = _is_replayed(trace.numbers[rows], node.thinning)
    return tuple(
        Read(
            file,
            start,
            stop,
            local,
            staged,
            prepare,
            first,
            served,
            CopyModel(local, copy, touched),
            tuple(node.copies.get(number, ())),
            *lost,
        )
        for file, start, stop, staged, prepare, first, served, copy, touched, number, *lost in zip(
            *(column[kept].tolist() for column in columns), strict=True
        )
    )


def _read_columns(
    trace: RankTrace, rows: NDArray[np.int64], work: NDArray[np.float64], *, tells_first_byte: bool
) -> tuple[NDArray[Any], ...]:
    """What is known of each read, in the order in which `_reads` takes it apart."""
    times = trace.spans.times[:, rows]
    is_staged = trace.spans.ways[rows] == Way.STAGED
    is_early = times[Step.ASKED] < _phase(trace, "stream").start
    first_byte = times[Step.FIRST_BYTE] - times[Step.ASKED] if tells_first_byte else np.zeros(len(rows))
    losses = losses_of(trace, rows)
    # Between its last byte and its copy a block is offered to others; one that was read early waits for the tensors there.
    copied_from = np.where(is_early & is_staged, times[Step.TAKEN], times[Step.LAST_BYTE])
    return (
        trace.file_ids[rows],
        trace.starts[rows],
        trace.stops[rows],
        is_staged,
        _prepare_seconds(trace, rows, is_staged=is_staged, is_early=is_early),
        first_byte,
        work,
        times[Step.LANDED] - copied_from,
        trace.spans.touch_seconds[rows],
        trace.numbers[rows],
        np.minimum(losses.before_seconds, first_byte),
        losses.after_share * work,
    )


def _prepare_seconds(
    trace: RankTrace, rows: NDArray[np.int64], *, is_staged: NDArray[np.bool_], is_early: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """From the moment at which a reader took each block up until it wanted a slot, or asked.

    Readers take blocks in order, each its next one when the last has landed. So with n readers the block at place n + m is taken up
    when the m-th block has landed, whichever that is.
    """
    times = trace.spans.times[:, rows]
    ready = _phase(trace, "stream").start
    landed = np.sort(times[Step.LANDED])
    num_first = min(len(rows), trace.conditions.concurrency)
    taken_up = np.concatenate([np.full(num_first, ready), landed[: len(rows) - num_first]])
    wanted = np.where(is_staged, times[Step.QUEUED], times[Step.ASKED])
    return np.where(is_early, 0.0, np.maximum(0.0, wanted - taken_up))
