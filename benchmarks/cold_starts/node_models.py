"""What changes where a node loads in another way? The model of its load made anew: several loads at once, tensors taken whole, reads divided."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.report.verdict.model import CopyModel, NodeModel, RankModel, Read


def side_by_side(models: Sequence[NodeModel]) -> NodeModel:
    """Independent loads on one node at the same time.

    Args:
        models: Of one rank or more each, all of one thinning, block size and pace.
    """
    ranks: list[RankModel] = []
    for model in models:
        ranks += [_moved(rank, len(ranks)) for rank in model.ranks]
    return replace(models[0], ranks=tuple(ranks))


def with_whole_blocks(model: NodeModel) -> NodeModel:
    """The same, where every rank copies all of a block that it takes from, as where tensors are broadcast.

    Args:
        model: Of ranks that each copy an equal part.
    """

    def whole(read: Read) -> Read:
        num_takers = 1 + len(read.copies)
        copies = tuple(copy.share(num_takers) for copy in read.copies)
        return read._replace(own=read.own.share(num_takers), copies=copies)

    ranks = (replace(rank, reads=tuple(map(whole, rank.reads))) for rank in model.ranks)
    return replace(model, ranks=tuple(ranks))


def part_of_nodes(model: NodeModel, num_nodes: int) -> NodeModel:
    """What one of so many nodes reads where each byte is read by one of them: as many blocks as any other, all a little smaller.

    Args:
        model: Of a node that reads all of it.
        num_nodes: How many share the reading.
    """
    ranks = (replace(rank, reads=_part_of_nodes(rank.reads, num_nodes)) for rank in model.ranks)
    return replace(model, ranks=tuple(ranks))


def _part_of_nodes(reads: Sequence[Read], num_nodes: int) -> tuple[Read, ...]:
    some = reads[::num_nodes]
    share = sum(read.num_bytes for read in reads) / (num_nodes * max(1, sum(read.num_bytes for read in some)))
    return tuple(read.part(read.start, read.start + max(1, round(read.num_bytes * share))) for read in some)


def _moved(rank: RankModel, by: int) -> RankModel:
    """The same at another position."""

    def moved(copy: CopyModel) -> CopyModel:
        return copy._replace(rank=copy.rank + by)

    reads = (
        read._replace(rank=read.rank + by, own=moved(read.own), copies=tuple(map(moved, read.copies)))
        for read in rank.reads
    )
    return replace(rank, rank=rank.rank + by, reads=tuple(reads), mapped=tuple(map(moved, rank.mapped)))
