"""Does a rank that the driver waits for still run? Its actor answers while it works; one that does not is looked at on its node.

A process that is stopped fails no call: Ray's own watchdog tells of it after seven minutes. Ranks that wait for it name it themselves.
Where all others are done, or there are none on its node, only the driver waits for it, and asks here.

silent and stopped    given up after `neighbour_seconds`
silent                given up after `progress_seconds`: something keeps Python's lock. The caller's own functions may do that for as
                      long as they like
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_streamer.cluster.failures import FailedCall
from ray_streamer.exchange.peer import PeerProcess

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ray_streamer.cluster.facts import RankFacts
    from ray_streamer.exchange.liveness import Timeouts

# Between two questions to a rank that answers, as a part of the shortest silence that counts.
_PAUSE = 0.25
# The most that counts of the time between two checks: in the rest this process did not run itself.
_MOST_SECONDS = 1.0


@dataclass(slots=True)
class _Silence:
    """What is known of one rank.

    Attributes:
        question: Not answered yet; None between two questions.
        seconds: Since it was asked, or since it answered.
        look: At its process, under way.
        look_again: After how many seconds of silence.
    """

    question: ray.ObjectRef[bool] | None = None
    seconds: float = 0.0
    look: ray.ObjectRef[bool] | None = None
    look_again: float = 0.0


@dataclass
class SilenceWatch:
    """Asks ranks whether they run, without ever waiting for an answer.

    Attributes:
        actors: Of all ranks.
        facts: Of all ranks.
        timeouts: How long a rank may be silent.
        runtime_env: Of the actors.
        waits_for_busy: Whether a rank that is not stopped may be silent without end.
    """

    actors: Sequence[Any]
    facts: Sequence[RankFacts]
    timeouts: Timeouts
    runtime_env: Mapping[str, Any] | None
    waits_for_busy: bool
    _ranks: dict[int, _Silence] = field(default_factory=dict)
    _checked: float = field(default_factory=time.monotonic)

    def check(self, awaited: Iterable[int]) -> FailedCall | None:
        """The first of the awaited ranks that was silent for too long; called several times a second."""
        now = time.monotonic()
        elapsed, self._checked = min(now - self._checked, _MOST_SECONDS), now
        silences = {rank: self._ranks.setdefault(rank, _Silence()) for rank in awaited}
        refs = [ref for silence in silences.values() for ref in (silence.question, silence.look) if ref is not None]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        for rank, silence in silences.items():
            silence.seconds += elapsed
            # What Ray cannot do now, it may be able to do later; what is wrong with a rank, the call that is awaited tells.
            with suppress(RayError):
                reason = self._listen(rank, silence, done)
                if reason is not None:
                    return FailedCall(rank, reason)
        return None

    def _listen(self, rank: int, silence: _Silence, done: set[ray.ObjectRef[Any]]) -> str | None:
        """Why a rank is given up."""
        timeouts, pid = self.timeouts, self.facts[rank].pid
        if silence.question is None:
            if silence.seconds >= _PAUSE * timeouts.neighbour_seconds:
                silence.question, silence.seconds = self.actors[rank].is_running.remote(), 0.0
        elif silence.question in done:
            self._ranks[rank] = _Silence()
        elif silence.look is not None and silence.look in done and ray.get(silence.look):
            return (
                f"its process {pid} has answered nothing for {silence.seconds:.1f} s and is stopped by a signal, longer than "
                f"neighbour_timeout_seconds={timeouts.neighbour_seconds:g}; let it go on with `kill -CONT {pid}`, or raise the setting"
            )
        elif silence.seconds >= timeouts.progress_seconds and not self.waits_for_busy:
            return (
                f"its process {pid} has answered nothing for progress_timeout_seconds={timeouts.progress_seconds:g}; look for a call "
                "that keeps Python's lock, with py-spy or gdb, or raise the setting"
            )
        elif silence.seconds >= max(timeouts.neighbour_seconds, silence.look_again):
            # A node that is slow to start the task gets no second one meanwhile.
            silence.look_again = 2 * silence.seconds
            silence.look = self._look(rank)
        return None

    def _look(self, rank: int) -> ray.ObjectRef[bool]:
        facts = self.facts[rank]
        return _looks.options(
            name=f"is rank {rank} stopped",
            runtime_env=self.runtime_env,
            scheduling_strategy=NodeAffinitySchedulingStrategy(facts.node_id, soft=False),
        ).remote(facts.pid, facts.process_start)


def is_stopped(pid: int, start: str | None) -> bool:
    """Whether a process of this machine is stopped by a signal; a debugger does not count.

    Args:
        pid: Its number, as its own node shows it.
        start: Its start, see `PeerProcess`: another PID namespace has another process of that number.
    """
    with closing(PeerProcess(pid)) as process:
        return process.start == start and process.is_stopped()


_remote: Any = ray.remote  # its type hints leave out enable_task_events
_looks = _remote(num_cpus=0, max_retries=0, enable_task_events=False)(is_stopped)
