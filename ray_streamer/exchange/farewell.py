"""How do the others learn why a rank stops? It tells everybody it is connected to, and those who are about to come.

A rank that fails, or learns of another one's failure, while ranks still meet stays for a while, so that whoever comes late hears
of it too, instead of waiting for ranks that are gone.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ray_streamer.errors import LoadAbortedError, RankFailedError, StartupTimeoutError
from ray_streamer.exchange.messages import Failure, encode_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_streamer.exchange.place import Place
    from ray_streamer.exchange.rendezvous import Link

FAREWELL_SECONDS = 1.0
"""How long a rank tries to tell neighbours that do not read."""

LINGER_SECONDS = 5.0
"""How long a rank stays for those that are late, when one failed before all had met."""


def say_farewell(
    error: BaseException | None,
    place: Place,
    links: Mapping[int, Link],
    missing: set[int],
    meet_more: Callable[[], None],
) -> None:
    """Tells the other ranks why this one stops.

    Args:
        error: What ended the session.
        place: Which rank this is.
        links: Connections, more of them as ranks come.
        missing: Local ranks that have not come, fewer of them as ranks come.
        meet_more: Lets ranks come; returns soon.
    """
    message = encode_failure(Failure.of(error, rank=place.rank, node=place.node))
    told: set[int] = set()
    _tell(links, told, message)
    is_known = isinstance(error, StartupTimeoutError) and error.ranks  # to whoever waits for the same ranks
    if not isinstance(error, Exception) or isinstance(error, LoadAbortedError) or is_known:
        return
    failed = (
        {place.ranks.index(error.rank)} if isinstance(error, RankFailedError) and error.rank in place.ranks else set()
    )
    deadline = time.monotonic() + LINGER_SECONDS
    while missing - failed and time.monotonic() < deadline:
        try:
            meet_more()
        except OSError:  # no descriptors are left: nobody else can be met
            return
        _tell(links, told, message)


def _tell(links: Mapping[int, Link], told: set[int], message: bytes) -> None:
    deadline = time.monotonic() + FAREWELL_SECONDS
    for local_rank in links.keys() - told:
        told.add(local_rank)
        connection = links[local_rank].socket
        with contextlib.suppress(OSError):
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            connection.send(message)
            connection.setblocking(False)
