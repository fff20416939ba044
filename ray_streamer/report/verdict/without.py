"""What would the node's load have been without one of its costs? Each answer is another model; its replay says what the cost was."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING

from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, useful_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_streamer.report.verdict.model import CopyModel, NodeModel, RankModel, Read

_LATE_TIMES = 3.0
_LATE_SECONDS = 0.05
"""An answer is late that took this many times the median, and this much longer."""


def without_first_byte(model: NodeModel) -> NodeModel:
    """Every answer begins at once; what failed requests lose is lost."""
    return _with_reads(model, lambda read: read._replace(first_byte_seconds=read.lost_seconds))


def without_losses(model: NodeModel) -> NodeModel:
    """No request fails, and none is held back because others did."""

    def change(read: Read) -> Read:
        return read._replace(
            first_byte_seconds=read.first_byte_seconds - read.lost_seconds,
            work_bytes=read.work_bytes - read.lost_bytes,
            lost_seconds=0.0,
            lost_bytes=0.0,
        )

    return _with_reads(model, change)


def without_late_answers(model: NodeModel) -> NodeModel:
    """No answer takes much longer than the usual one, to begin or to come; what failed requests lose is lost."""
    reads = [read for rank in without_losses(model).ranks for read in rank.reads]
    if not reads:
        return model
    usual_first = median(read.first_byte_seconds for read in reads)
    usual_work = median(_work_per_byte(read) for read in reads)
    latest_first = max(_LATE_TIMES * usual_first, usual_first + _LATE_SECONDS)

    def change(read: Read) -> Read:
        first, work = read.first_byte_seconds - read.lost_seconds, read.work_bytes - read.lost_bytes
        is_slow = work > _LATE_TIMES * usual_work * read.num_bytes
        return read._replace(
            first_byte_seconds=read.lost_seconds + (usual_first if first > latest_first else first),
            work_bytes=read.lost_bytes + (usual_work * read.num_bytes if is_slow else work),
        )

    return _with_reads(model, change)


def without_node_rate(model: NodeModel) -> NodeModel:
    """Streams share nothing."""
    return replace(model, node_rate=math.inf)


def without_stream_rate(model: NodeModel) -> NodeModel:
    """One stream can have all that the node gets."""
    return replace(model, stream_rate=math.inf)


def without_slots(model: NodeModel) -> NodeModel:
    """No memory limit: a rank has all the slots that it would use."""
    ranks = (replace(rank, num_slots=max(rank.num_slots, _unlimited_slots(model, rank))) for rank in model.ranks)
    return replace(model, ranks=tuple(ranks))


def _unlimited_slots(model: NodeModel, rank: RankModel) -> int:
    return useful_slots(memory_limit=AS_MUCH_AS_USEFUL, block_bytes=model.block_bytes, concurrency=rank.num_readers)


def without_copies(model: NodeModel) -> NodeModel:
    """Bytes are in their tensors as soon as they are there."""
    return _with_copies(without_first_touch(model), lambda copy: copy._replace(seconds=0.0))


def without_first_touch(model: NodeModel) -> NodeModel:
    """Tensors lie in memory that was used before."""

    def prepared(read: Read) -> Read:
        # What is read straight into its tensor is not copied: its memory was touched before the read.
        touch_seconds = 0.0 if read.is_staged else read.own.touch_seconds
        own = read.own if read.is_staged else read.own._replace(touch_seconds=0.0)
        return read._replace(prepare_seconds=max(0.0, read.prepare_seconds - touch_seconds), own=own)

    def touched(copy: CopyModel) -> CopyModel:
        return copy._replace(seconds=max(0.0, copy.seconds - copy.touch_seconds), touch_seconds=0.0)

    return _with_copies(_with_reads(model, prepared), touched)


def without_device_start(model: NodeModel) -> NodeModel:
    """Tensors are there from the beginning."""
    return replace(model, ranks=tuple(replace(rank, ready_seconds=rank.begin_seconds) for rank in model.ranks))


def without_straggler(model: NodeModel, local: int) -> NodeModel:
    """The rank at position `local` is as quick as the others usually are, in everything that it does and that others await of it."""
    slow = model.ranks[local]
    others = [rank for rank in model.ranks if rank is not slow]

    def times(number: Callable[[Read], float]) -> float:
        return _ratio([number(read) for read in slow.reads], [number(read) for rank in others for read in rank.reads])

    # Requests that failed are the storage's doing, whichever rank they met.
    first = times(lambda read: read.first_byte_seconds - read.lost_seconds)
    work = times(_work_per_byte)
    prepare = times(lambda read: read.prepare_seconds)
    own = times(lambda read: read.own.seconds)
    foreign = [copy for rank in model.ranks for copy in _foreign_copies(rank)]
    taken = _ratio(
        [copy.seconds for copy in foreign if copy.rank == local],
        [copy.seconds for copy in foreign if copy.rank != local],
    )

    def change(read: Read) -> Read:
        if read.rank != local:
            return read
        return read._replace(
            first_byte_seconds=read.lost_seconds + (read.first_byte_seconds - read.lost_seconds) / first,
            work_bytes=read.work_bytes / work,
            prepare_seconds=read.prepare_seconds / prepare,
        )

    def change_copy(copy: CopyModel, *, is_own: bool) -> CopyModel:
        return copy._replace(seconds=copy.seconds / (own if is_own else taken)) if copy.rank == local else copy

    changed = _with_reads(model, change)
    changed = _with_copies(
        changed, lambda copy: change_copy(copy, is_own=False), lambda copy: change_copy(copy, is_own=True)
    )
    changed = _with_prompt_offers(changed, local)
    quick = replace(
        changed.ranks[local],
        begin_seconds=min(slow.begin_seconds, median(rank.begin_seconds for rank in others)),
        ready_seconds=min(slow.ready_seconds, median(rank.ready_seconds for rank in others)),
    )
    return replace(changed, ranks=(*changed.ranks[:local], quick, *changed.ranks[local + 1 :]))


def _with_prompt_offers(model: NodeModel, local: int) -> NodeModel:
    """What the rank at `local` offers is known to others, and what they offer to it, after no longer than usual."""

    def is_slow(read: Read, copy: CopyModel) -> bool:
        return local in (read.rank, copy.rank)

    offers = [(read, copy) for rank in model.ranks for read in rank.reads for copy in read.copies]
    among_others = [copy.delay_seconds for read, copy in offers if not is_slow(read, copy)]
    of_slow = [copy.delay_seconds for read, copy in offers if is_slow(read, copy)]
    if among_others:
        usual = median(among_others)
    elif len(of_slow) > 1:
        # Of two ranks, one has a part in every offer. Now and then it has its CPU when one comes.
        usual = quantiles(of_slow, n=4)[0]
    else:
        return model

    def change(read: Read) -> Read:
        copies = (
            copy._replace(delay_seconds=min(copy.delay_seconds, usual)) if is_slow(read, copy) else copy
            for copy in read.copies
        )
        return read._replace(copies=tuple(copies))

    return _with_reads(model, change)


def _with_reads(model: NodeModel, change: Callable[[Read], Read]) -> NodeModel:
    return replace(model, ranks=tuple(replace(rank, reads=tuple(map(change, rank.reads))) for rank in model.ranks))


def _with_copies(
    model: NodeModel,
    change: Callable[[CopyModel], CopyModel],
    change_own: Callable[[CopyModel], CopyModel] | None = None,
) -> NodeModel:
    """Every copy changed; readers' own ones in a way of their own, where one is given."""
    own = change_own or change
    changed = _with_reads(model, lambda read: read._replace(own=own(read.own), copies=tuple(map(change, read.copies))))
    return replace(
        changed, ranks=tuple(replace(rank, mapped=tuple(map(change, rank.mapped))) for rank in changed.ranks)
    )


def _foreign_copies(rank: RankModel) -> Iterable[CopyModel]:
    """Copies out of the blocks that a rank reads, and out of the files that it maps."""
    yield from rank.mapped
    for read in rank.reads:
        yield from read.copies


def _work_per_byte(read: Read) -> float:
    return read.work_bytes / read.num_bytes


def _ratio(slow: list[float], others: list[float]) -> float:
    """How many times as long the one takes as the others do, in the mean; 1 when it takes no longer.

    A process that gets its CPU in slices does most of its short steps at full speed, and a few very slowly.
    """
    usual = fmean(others) if others else 0.0
    return max(1.0, fmean(slow) / usual) if slow and usual > 0 else 1.0
