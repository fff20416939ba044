"""Which ranks share a node? Nothing more: neighbours can share memory, ranks of different nodes cannot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from ray_streamer.errors import PlanError
from ray_streamer.units import counted

MAX_RANKS = 1 << 20
"""More than any cluster has: a number beyond it is a mistake, and no work is done for what it claims."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks by node, each rank on exactly one node.

    >>> Topology(((0, 1), (2, 3))).node_of(2)
    1
    """

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(chain.from_iterable(self.nodes))
        if not ranks or ranks != list(range(len(ranks))) or not all(self.nodes):
            raise PlanError(
                f"a topology needs every rank from 0 on exactly one node and no empty node, got {self.nodes}"
            )

    @classmethod
    def even(cls, num_ranks: int, num_nodes: int = 1) -> Topology:
        """`num_ranks` packed in order over `num_nodes`, the first nodes one rank fuller where it does not divide."""
        if not isinstance(num_nodes, int):
            raise PlanError(f"a number of nodes is a whole number, got {num_nodes!r}")
        if num_ranks > MAX_RANKS:
            raise PlanError(f"{num_ranks} ranks are more than any cluster has; at most {MAX_RANKS} can be planned")
        if not 1 <= num_nodes <= num_ranks:
            raise PlanError(
                f"{counted(num_ranks, 'rank')} cannot lie on {counted(num_nodes, 'node')}, each with at least one; lower num_nodes"
            )
        base, extra = divmod(num_ranks, num_nodes)
        sizes = [base + (node < extra) for node in range(num_nodes)]
        firsts = [sum(sizes[:node]) for node in range(num_nodes)]
        return cls(tuple(tuple(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)))

    @property
    def num_ranks(self) -> int:
        """Ranks over all nodes."""
        return sum(map(len, self.nodes))

    def node_of(self, rank: int) -> int:
        """Position in `nodes` of the node that holds `rank`."""
        for node, ranks in enumerate(self.nodes):
            if rank in ranks:
                return node
        raise PlanError(f"rank {rank} is not one of the {counted(self.num_ranks, 'rank')} of this topology")
