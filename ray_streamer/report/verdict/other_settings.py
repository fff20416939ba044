"""What would the node's load be under other settings? Another number of readers or slots, or files cut into other blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ray_streamer.report.verdict.model import CopyModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.report.verdict.model import NodeModel, Read


def under_settings(model: NodeModel, *, num_readers: int, num_slots: int, block_bytes: int) -> NodeModel:
    """The same load on every rank with so many readers and slots, and files cut on another grid.

    A part of a block costs its share of the block's bytes, and the whole wait for a first byte; blocks that become one wait once.
    """
    if block_bytes != model.block_bytes:
        model = _with_blocks(model, block_bytes)
    ranks = (replace(rank, num_readers=num_readers, num_slots=max(1, num_slots)) for rank in model.ranks)
    return replace(model, ranks=tuple(ranks))


def _with_blocks(model: NodeModel, block_bytes: int) -> NodeModel:
    reads = sorted((read for rank in model.ranks for read in rank.reads), key=lambda read: (read.file, read.start))
    given: list[list[Read]] = [[] for _ in model.ranks]
    sizes = [0] * len(given)
    for read in _split(reads, block_bytes) if block_bytes < model.block_bytes else _merged(reads, block_bytes):
        # As the plan does: whoever has read least of those that want it.
        reader = min((read.rank, *(copy.rank for copy in read.copies)), key=sizes.__getitem__)
        sizes[reader] += read.num_bytes
        given[reader].append(_read_by(read, reader))
    ranks = (replace(rank, reads=tuple(some)) for rank, some in zip(model.ranks, given, strict=True))
    return replace(model, ranks=tuple(ranks), block_bytes=block_bytes)


def _read_by(read: Read, reader: int) -> Read:
    """The same read by another of the ranks that want it."""
    copies = (read.own, *read.copies)
    own = next(copy for copy in copies if copy.rank == reader)
    return read._replace(rank=reader, own=own, copies=tuple(copy for copy in copies if copy.rank != reader))


def _split(reads: Sequence[Read], block_bytes: int) -> Iterator[Read]:
    for read in reads:
        start = read.start
        while start < read.stop:
            stop = min(read.stop, (start // block_bytes + 1) * block_bytes)
            yield read.part(start, stop)
            start = stop


def _merged(reads: Sequence[Read], block_bytes: int) -> Iterator[Read]:
    """Reads that follow each other without a gap, in one cell of the new grid, as one."""
    some: list[Read] = []
    for read in reads:
        if some and not _belong_together(some[-1], read, block_bytes):
            yield _joined(some)
            some = []
        some.append(read)
    if some:
        yield _joined(some)


def _belong_together(before: Read, read: Read, block_bytes: int) -> bool:
    return (
        (before.file, before.stop, before.is_staged) == (read.file, read.start, read.is_staged)
        and before.start // block_bytes == read.start // block_bytes
        and _wanted_by(before) == _wanted_by(read)
    )


def _wanted_by(read: Read) -> set[int]:
    return {read.rank, *(copy.rank for copy in read.copies)}


def _joined(reads: Sequence[Read]) -> Read:
    first = reads[0]
    copies: dict[int, CopyModel] = {}
    for read in reads:
        for copy in (read.own, *read.copies):
            copies[copy.rank] = _sum(copies[copy.rank], copy) if copy.rank in copies else copy
    own = copies.pop(first.rank)
    return first._replace(
        stop=reads[-1].stop,
        prepare_seconds=sum(read.prepare_seconds for read in reads),
        first_byte_seconds=sum(read.first_byte_seconds for read in reads) / len(reads),
        work_bytes=sum(read.work_bytes for read in reads),
        lost_seconds=sum(read.lost_seconds for read in reads) / len(reads),
        lost_bytes=sum(read.lost_bytes for read in reads),
        own=own,
        copies=tuple(copies.values()),
    )


def _sum(one: CopyModel, other: CopyModel) -> CopyModel:
    return CopyModel(
        one.rank,
        one.seconds + other.seconds,
        one.touch_seconds + other.touch_seconds,
        max(one.delay_seconds, other.delay_seconds),
    )
