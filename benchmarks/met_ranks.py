"""How do the ranks of a benchmark meet without a driver? By the name of a session, on one node, each with the same limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.rank.agreement import MemoryTerms

if TYPE_CHECKING:
    from ray_streamer.cluster.worker import LoadWorker
    from ray_streamer.rank.request import LoadRequest


def meet(worker: LoadWorker, request: LoadRequest, *, rank: int, session: str, memory_limit: int) -> None:
    """Every rank calls it, in a process of its own; afterwards each can load.

    Args:
        worker: Of this rank.
        request: The load.
        rank: This rank.
        session: Its name, the same for all ranks.
        memory_limit: Staging bytes of each rank.
    """
    num_ranks = request.mesh.num_ranks
    terms = MemoryTerms(memory_limit, request.read_limits((memory_limit,) * num_ranks))
    place = Place(
        session=session,
        rank=rank,
        ranks=tuple(range(num_ranks)),
        node="here",
        timeouts=Timeouts.of(request.settings),
    )
    worker.agree(request, worker.read_index(request), place, terms)
