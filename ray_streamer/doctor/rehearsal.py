"""How fast do all ranks load here, side by side? They load a part of the checkpoint, as they would load all of it, and let it go.

Nothing else tells what a load takes: the same blocks by the same reader, from the disk around the page cache or out of it, by as many
processes, with the copies of each rank and the CPUs that all of them share. What the part took is then scaled to the whole.
"""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
from contextlib import ExitStack, suppress
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

_WAIT_SECONDS = 300.0
"""For all ranks of a rehearsal, torch's import included."""


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


def rehearse(request: LoadRequest, *, max_bytes: int) -> Rehearsal | None:
    """Loads about `max_bytes` of the checkpoint into all ranks of this node, each a process; None where nothing can be taken out of it.

    Args:
        request: A load whose ranks are all on this node, in host memory.
        max_bytes: Of the checkpoint.

    Raises:
        RayStreamerError: What a rank met.
        ClusterError: A rank ended without a word, or not in time.
    """
    part = replace(request, slices=SampledSlices(request.slices, max_bytes))
    words = pickle.dumps((part, secrets.token_hex(8)))
    with ExitStack() as owned:
        ranks = [_start(owned, rank, words) for rank in range(request.mesh.num_ranks)]
        told = [_told_by(process, rank) for rank, process in enumerate(ranks)]
    return Rehearsal.of(told, RequestedSettings.of(request.settings))


def _start(owned: ExitStack, rank: int, words: bytes) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_streamer.doctor.rehearsed_rank", str(rank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    owned.callback(_end, process)
    assert process.stdin is not None
    # A process that has ended already says why by its exit code.
    with suppress(BrokenPipeError):
        process.stdin.write(words)
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdin = None
    return process


def _told_by(process: subprocess.Popen[bytes], rank: int) -> RehearsedRank:
    try:
        answer, _ = process.communicate(timeout=_WAIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"rank {rank} of a rehearsed load was not done within {_WAIT_SECONDS:g} s") from error
    if process.returncode or not answer:
        raise ClusterError(
            f"rank {rank} of a rehearsed load ended with exit code {process.returncode} before it was done; what it said is above"
        )
    told: RehearsedRank | RayStreamerError = pickle.loads(answer)
    if isinstance(told, RayStreamerError):
        raise told
    return told


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
