"""Is one of a store's addresses slower than its others? Bodies by the address that sent them, compared at the end of a load.

An object store answers at many addresses, and connections are spread over all of them. A server that is ill still answers: its bodies
take several times as long as the others, and nothing fails.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.storage.base import Incident

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SLOWER = 3.0
"""An address is slow whose usual body comes at less than the usual rate of the others by this factor."""

_FEWEST_BODIES = 4
"""Of an address of which anything can be said."""


class Body(NamedTuple):
    """One body that came.

    Attributes:
        address: Of the server, or of the proxy before it.
        path: The file.
        offset: First byte in the file.
        num_bytes: That came.
        began: Its first byte, by `time.perf_counter`.
        ended: Its last byte.
    """

    address: str
    path: str
    offset: int
    num_bytes: int
    began: float
    ended: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.num_bytes / max(self.ended - self.began, 1e-9)


def bodies_from_slow_addresses(bodies: Sequence[Body]) -> Iterator[Incident]:
    """Each body of a slow address, and how much longer it took than the others would have."""
    by_address: dict[str, list[Body]] = defaultdict(list)
    for body in bodies:
        by_address[body.address].append(body)
    known = {address: each for address, each in by_address.items() if address and len(each) >= _FEWEST_BODIES}
    for address, slow in known.items():
        others = [body.rate for other, each in known.items() if other != address for body in each]
        if not others or median(body.rate for body in slow) * _SLOWER > median(others):
            continue
        usual = median(others)
        for body in slow:
            lost_seconds = body.ended - body.began - body.num_bytes / usual
            if lost_seconds > 0:
                yield Incident("slow address", body.ended, body.path, body.offset, lost_seconds, address)
