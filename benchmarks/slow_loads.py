"""Which loads are slow on purpose, and by what? The cases of `verdict.py`.

Where what is slow costs a small part of the load, the checkpoint is larger: the gain is to be told from the difference of any two loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ray_streamer.testing.faults import Fault

MIB = 1 << 20


class Size(NamedTuple):
    """A checkpoint.

    Attributes:
        times: See `Case.times`.
        is_local: See `Case.is_local`.
    """

    times: int
    is_local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load that is slow on purpose.

    Attributes:
        name: What makes it slow.
        bounds: What the verdict may name.
        then: What is loaded next: as the verdict advises; without what makes it slow; or into the same tensors.
        faults: What requests meet, in turn, again and again.
        settings: Of the load.
        is_local: Whether files of the page cache are loaded.
        times: Size of its checkpoint, in units of `--megabytes`.
        slow_rank: Whether rank 1 runs a fifth of the time.
    """

    name: str
    bounds: tuple[str, ...]
    then: Literal["advice", "without", "again"]
    faults: tuple[Fault, ...] = (Fault(),)
    settings: dict[str, Any] = field(default_factory=dict)
    is_local: bool = False
    times: int = 1
    slow_rank: bool = False

    @property
    def size(self) -> Size:
        """Of its checkpoint, and where that is."""
        return Size(self.times, self.is_local)


CASES = (
    Case(
        name="storage throttled: 5 MB/s for each stream",
        bounds=("stream rate", "bandwidth"),
        then="advice",
        faults=(Fault(bytes_per_second=5e6),),
    ),
    Case(name="first byte of 200 ms", bounds=("first byte",), then="advice", faults=(Fault(delay_seconds=0.2),)),
    Case(
        name="one slow rank: has a fifth of its CPU",
        bounds=("straggler",),
        then="without",
        faults=(Fault(delay_seconds=0.02),),
        slow_rank=True,
    ),
    Case(
        name="memory for one slot, first byte of 20 ms",
        bounds=("slots",),
        then="advice",
        faults=(Fault(delay_seconds=0.02),),
        settings={"memory_limit": 0},
    ),
    Case(
        name="503 on 5% of requests, 256 KiB each",
        bounds=("throttling",),
        then="without",
        # Enough requests that the waits after 503s are more than chance. One at a time, and answers as late as over a network: else the CPUs,
        # which server, proxy and ranks share here, would be what all of them wait for, and would be free for others while one waits.
        settings={"block_bytes": MIB // 4, "concurrency": 1},
        faults=(*(Fault(delay_seconds=0.005),) * 10, Fault(status=503), *(Fault(delay_seconds=0.005),) * 9),
        times=2,
    ),
    Case(name="everything in the page cache", bounds=("first touch", "copies"), then="again", is_local=True, times=16),
)
