"""How long does a small load take? Every rank is a process of its own; ranks of a node read for each other.

Nodes know nothing of each other, and share a storage behind a proxy that says how soon answers begin, how fast each comes, and how fast all
come together. A node's link is its `max_bandwidth`.
"""

from __future__ import annotations

import multiprocessing
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from met_ranks import meet

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.observe import observe_node

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from fault_process import FaultProcess

    from cold_starts.small_cases import Small
    from ray_streamer.rank.request import LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What a process loads next."""

    request: LoadRequest
    rank: int
    session: str


def rank_main(pipe: Connection) -> None:
    """One process: loads what it is told to, and gives the trace."""
    import torch  # noqa: F401  # imported by the first load, it would be a part of it

    while (order := pipe.recv()) is not None:
        request = order.request
        worker = LoadWorker(order.rank, request)
        assert request.settings.memory_limit is not None
        meet(worker, request, session=order.session, memory_limit=request.settings.memory_limit)
        # The proxy's faults begin here, and all ranks load at once.
        pipe.send(None)
        pipe.recv()
        worker.load()
        pipe.send(worker.trace().to_bytes())
        worker.close()


class Processes:
    """As many as any case has ranks.

    Args:
        number: Of them.
    """

    def __init__(self, number: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(number):
            here, there = spawn.Pipe()
            self._pipes.append(here)
            process = spawn.Process(target=rank_main, args=(there,), daemon=True)
            process.start()
            self._processes.append(process)

    def load(self, small: Small, uri: str, proxy: FaultProcess) -> float:
        """Seconds until the last node has loaded, each from the first moment of its ranks."""
        orders = [
            _Order(request=small.request(uri, node=node, endpoint_url=proxy.url), rank=rank, session=session)
            for node in range(small.num_nodes)
            for session in [secrets.token_hex(8) for _ in range(small.num_apart)]
            for rank in range(small.num_ranks)
        ]
        used = self._pipes[: len(orders)]
        for pipe, order in zip(used, orders, strict=True):
            pipe.send(order)
        for pipe in used:
            pipe.recv()
        proxy.plan_faults(small.faults)
        for pipe in used:
            pipe.send(None)
        traces = [RankTrace.from_bytes(pipe.recv()) for pipe in used]
        proxy.plan_faults(())
        firsts = range(0, len(traces), small.num_ranks)
        nodes = [observe_node(traces[first : first + small.num_ranks]) for first in firsts]
        return max(node.measured_seconds for node in nodes if node is not None)

    def close(self) -> None:
        """Ends them."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
