"""How long does a whole load take, when only a part of it is replayed? The part stands for the rest, except for what happens once.

An observed load is no more even than its storage was, so all that was replayed of it is multiplied, but for what came before its first
tensor. A planned load is even: its second half goes on as the rest of it would, without the start and with the same end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_streamer.report.verdict.model import ClusterModel, NodeModel


def has_even_excerpt(cluster: ClusterModel) -> bool:
    """Whether the first half has to be replayed, too."""
    return any(group.node.is_even and group.node.thinning > 1 for group in cluster.groups)


def first_half(cluster: ClusterModel) -> ClusterModel:
    """The first half of each rank's reads and copies."""
    return replace(
        cluster, groups=tuple(group._replace(node=_first_half_of_node(group.node)) for group in cluster.groups)
    )


def whole_seconds(model: NodeModel, seconds: float, half_seconds: float) -> float:
    """What the whole load takes.

    Args:
        model: Of which all was replayed.
        seconds: What that took.
        half_seconds: What its first half takes, where it is even.
    """
    if model.is_even:
        num_tasks, num_first = _num_tasks(model), _num_tasks(_first_half_of_node(model))
        each = (seconds - half_seconds) / max(1, num_tasks - num_first)
        return seconds + (model.thinning - 1) * num_tasks * each
    before = min(seconds, min((rank.ready_seconds for rank in model.ranks), default=0.0))
    return before + model.thinning * (seconds - before)


def _first_half_of_node(model: NodeModel) -> NodeModel:
    ranks = (
        replace(rank, reads=rank.reads[: len(rank.reads) // 2], mapped=rank.mapped[: len(rank.mapped) // 2])
        for rank in model.ranks
    )
    return replace(model, ranks=tuple(ranks))


def _num_tasks(model: NodeModel) -> int:
    return sum(len(rank.reads) + len(rank.mapped) for rank in model.ranks)
