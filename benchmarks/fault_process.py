"""How is the work of a proxy kept out of the measured process? By running in another one."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Self, cast

from ray_streamer.testing.faults import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection


class FaultProcess:
    """A `FaultProxy` in a process of its own, for the length of a `with` block.

    Args:
        server_url: Of the server.
        bytes_per_second: Of all bodies together.

    Attributes:
        url: Where the proxy listens.
    """

    def __init__(self, server_url: str, *, bytes_per_second: float | None = None) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(server_url, bytes_per_second, theirs), daemon=True
        )
        self._process.start()
        self.url: str = self._pipe.recv()

    def plan_faults(self, faults: Sequence[Fault]) -> None:
        """The next ranged requests get these, and what was left of earlier ones is forgotten."""
        self._pipe.send(list(faults))
        self._pipe.recv()

    def counts(self) -> tuple[int, int]:
        """Ranged requests, and faults among them, since faults were planned last."""
        self._pipe.send("count")
        return cast("tuple[int, int]", self._pipe.recv())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join()
        self._pipe.close()


def _serve(server_url: str, bytes_per_second: float | None, pipe: Connection) -> None:
    with FaultProxy(server_url, bytes_per_second=bytes_per_second) as proxy:
        pipe.send(proxy.url)
        before = (0, 0)
        while (order := pipe.recv()) is not None:
            if order == "count":
                pipe.send((len(proxy.ranges) - before[0], proxy.num_faults - before[1]))
                continue
            proxy.forget_faults()
            proxy.fail_next(*order)
            before = len(proxy.ranges), proxy.num_faults
            pipe.send("done")
