"""Does a rank that the driver waits for still run, and get on? Its actor answers while it works; one that does not is looked at on its node.

A process that is stopped fails no call: Ray's own watchdog tells of it after seven minutes. Ranks that wait for it name it themselves.
Where all others are done, or there are none on its node, only the driver waits for it, and asks here.

silent and stopped    given up after `neighbour_seconds`
silent                given up after `progress_seconds`: something keeps Python's lock
answers, but stuck    given up where its own work makes no step for `progress_seconds`: a disk or a device that hangs

The caller's own functions may take as long as they like, unless the process is stopped.
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
    from ray_streamer.exchange.messages import Pulse

# Between two questions to a rank that answers, as a part of the shortest silence that counts.
_PAUSE = 0.25
# The most that counts of the time between two checks: in the rest this process did not run itself.
_MOST_SECONDS = 1.0


@dataclass(slots=True)
class _Rank:
    """What is known of one rank.

    Attributes:
        question: Not answered yet; None between two questions.
        seconds: Since it was asked, or since it answered.
        look: At its process, under way.
        look_again: After how many seconds of silence.
        pulse: What it said last.
        stuck_seconds: Since it began to say that.
    """

    question: ray.ObjectRef[Pulse | None] | None = None
    seconds: float = 0.0
    look: ray.ObjectRef[bool] | None = None
    look_again: float = 0.0
    pulse: Pulse | None = None
    stuck_seconds: float = 0.0

    def hear(self, pulse: Pulse | None) -> None:
        """It answered."""
        if pulse != self.pulse:
            self.pulse, self.stuck_seconds = pulse, 0.0
        self.question, self.seconds, self.look, self.look_again = None, 0.0, None, 0.0


@dataclass
class PulseWatch:
    """Asks ranks what they do, without ever waiting for an answer.

    Attributes:
        actors: Of all ranks.
        facts: Of all ranks.
        timeouts: How long a rank may be silent, or make no step.
        runtime_env: Of the actors.
        waits_for_busy: Whether a rank that is not stopped may be silent, and make no step, without end.
    """

    actors: Sequence[Any]
    facts: Sequence[RankFacts]
    timeouts: Timeouts
    runtime_env: Mapping[str, Any] | None
    waits_for_busy: bool
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _checked: float = field(default_factory=time.monotonic)

    def check(self, awaited: Iterable[int]) -> FailedCall | None:
        """The first of the awaited ranks that was silent or stuck for too long; called several times a second."""
        now = time.monotonic()
        elapsed, self._checked = min(now - self._checked, _MOST_SECONDS), now
        known = {rank: self._ranks.setdefault(rank, _Rank()) for rank in awaited}
        refs = [ref for one in known.values() for ref in (one.question, one.look) if ref is not None]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        for rank, one in known.items():
            one.seconds += elapsed
            one.stuck_seconds += elapsed
            # What Ray cannot do now, it may be able to do later; what is wrong with a rank, the call that is awaited tells.
            with suppress(RayError):
                reason = self._listen(rank, one, done)
                if reason is not None:
                    return FailedCall(rank, reason)
        return None

    def _listen(self, rank: int, one: _Rank, done: set[ray.ObjectRef[Any]]) -> str | None:
        """Why a rank is given up."""
        timeouts, pid = self.timeouts, self.facts[rank].pid
        if one.question is not None and one.question in done:
            one.hear(ray.get(one.question))
        if one.question is None:
            if one.seconds >= _PAUSE * timeouts.neighbour_seconds:
                one.question, one.seconds = self.actors[rank].pulse.remote(), 0.0
        elif one.look is not None and one.look in done and ray.get(one.look):
            return (
                f"its process {pid} has answered nothing for {one.seconds:.1f} s and is stopped by a signal, longer than "
                f"neighbour_timeout_seconds={timeouts.neighbour_seconds:g}; let it go on with `kill -CONT {pid}`, or raise the setting"
            )
        elif one.seconds >= timeouts.progress_seconds and not self.waits_for_busy:
            return (
                f"its process {pid} has answered nothing for progress_timeout_seconds={timeouts.progress_seconds:g}; look for a call "
                "that keeps Python's lock, with py-spy or gdb, or raise the setting"
            )
        elif one.seconds >= max(timeouts.neighbour_seconds, one.look_again):
            # A node that is slow to start the task gets no second one meanwhile.
            one.look_again = 2 * one.seconds
            one.look = self._look(rank)
        return self._why_stuck(pid, one)

    def _why_stuck(self, pid: int, one: _Rank) -> str | None:
        """A rank that waits for others is not stuck: those for whom it waits are."""
        seconds = self.timeouts.progress_seconds
        if self.waits_for_busy or one.pulse is None or not one.pulse.is_busy or one.stuck_seconds < seconds:
            return None
        return (
            f"its process {pid} answers, but has made no progress for progress_timeout_seconds={seconds:g} while {one.pulse.phase}; "
            "look for a disk or a device that hangs, or raise the setting"
        )

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
