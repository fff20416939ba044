"""How fast do all ranks load here, side by side? They load a part of the checkpoint, as they would load all of it, and let it go.

Nothing else tells what a load takes: the same blocks by the same reader, from the disk around the page cache or out of it, by as many
processes, with the copies of each rank and the CPUs that all of them share. What the part took is then scaled to the whole.

One try says what one load took. Two loads of the same bytes differ, so there are several tries, and the one in the middle is believed.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.doctor.sample import SampledSlices
from ray_streamer.errors import ClusterError, RayStreamerError
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.model import RequestedSettings

if TYPE_CHECKING:
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics

_SECONDS = 2.0
"""How long the rehearsed part should take, at the rate that was measured before."""

_LEAST_BYTES, _MOST_BYTES = 64 << 20, 2 << 30
_MEMORY_SHARE = 0.125
"""Share of the available memory that the part may fill."""

_PLACES = (0.5, 1 / 6, 5 / 6)
"""Where in each file a try takes its part, one try after the other: elsewhere than the others, which may have left theirs in a cache."""

_WAIT_SECONDS = 300.0
"""For all tries of all ranks, torch's import included."""


class RehearsedRank(NamedTuple):
    """What one rank tells of its part.

    Attributes:
        trace: As `RankTrace.to_bytes` writes it.
        statistics: What it counted.
    """

    trace: bytes
    statistics: RankStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A part of a load that was made.

    Attributes:
        delivered_bytes: Into the tensors of all ranks.
        seconds: From the first read until all ranks were done.
        start_seconds: Before that: the ranks' arenas, and what they told each other.
        bound: What bounded it; see `Verdict.bound`.
        cpu_seconds: Of all ranks.
    """

    delivered_bytes: int
    seconds: float
    start_seconds: float
    bound: str
    cpu_seconds: float

    @classmethod
    def of(cls, ranks: list[RehearsedRank], asked: RequestedSettings) -> Rehearsal | None:
        """What all ranks told; None when they had nothing to load."""
        statistics = [rank.statistics for rank in ranks]
        delivered_bytes = sum(rank.bytes_delivered for rank in statistics)
        verdict = judge([RankTrace.from_bytes(rank.trace) for rank in ranks], statistics, asked)
        if not delivered_bytes or verdict is None:
            return None
        return cls(
            delivered_bytes=delivered_bytes,
            seconds=max(rank.seconds["stream"] + rank.seconds["finish"] for rank in statistics),
            start_seconds=max(rank.seconds["connect"] + rank.seconds["device"] for rank in statistics),
            bound=verdict.bound,
            cpu_seconds=sum(rank.cpu_seconds for rank in statistics),
        )

    def seconds_for(self, delivered_bytes: int) -> float:
        """What a load takes that brings so many bytes into tensors."""
        return self.start_seconds + self.seconds * delivered_bytes / self.delivered_bytes


def sample_bytes(bytes_per_second: float, *, available_bytes: int) -> int:
    """How much of a checkpoint to rehearse.

    Args:
        bytes_per_second: At which it is read, about.
        available_bytes: Memory of this node.
    """
    wanted = min(max(_LEAST_BYTES, _SECONDS * bytes_per_second), _MOST_BYTES)
    return int(min(wanted, _MEMORY_SHARE * available_bytes))


def rehearse(request: LoadRequest, *, max_bytes: int) -> tuple[Rehearsal, ...]:
    """Loads a part of the checkpoint into all ranks of this node, each a process; several tries, or none where nothing can be taken out of it.

    Args:
        request: A load whose ranks are all on this node, in host memory.
        max_bytes: Of the checkpoint, about, in each try.

    Raises:
        RayStreamerError: What a rank met.
        ClusterError: A rank ended without a word, or not in time.
    """
    parts = [replace(request, slices=SampledSlices(request.slices, max_bytes, place)) for place in _PLACES]
    asked = RequestedSettings.of(request.settings)
    tries = (Rehearsal.of(ranks, asked) for ranks in _told_of(parts))
    return tuple(told for told in tries if told is not None)


def _told_of(parts: list[LoadRequest]) -> list[list[RehearsedRank]]:
    """What the ranks told of each part."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_streamer.doctor.rehearsed_ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Its ranks are processes of this group.
        process_group=0,
    )
    try:
        answer, _ = process.communicate(pickle.dumps((parts, secrets.token_hex(8))), timeout=_WAIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"the ranks of a rehearsed load were not done within {_WAIT_SECONDS:g} s") from error
    finally:
        if process.returncode != 0:
            _end(process)
    if process.returncode or not answer:
        raise ClusterError(
            f"the ranks of a rehearsed load ended with exit code {process.returncode} before they were done; what they said is above"
        )
    told: list[list[RehearsedRank]] | RayStreamerError = pickle.loads(answer)
    if isinstance(told, RayStreamerError):
        raise told
    return told


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it with its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
