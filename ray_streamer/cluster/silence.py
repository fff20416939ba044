"""Does a rank that the driver waits for still run? Its actor answers while it works; one that does not is looked at on its node.

A process that is stopped or hangs fails no call: Ray's own watchdog tells of it after seven minutes. Ranks that wait for it name it
themselves. Where all others are done, or there are none on its node, only the driver waits for it, and asks here.

A process that is silent because something keeps Python's lock is not idle, and is waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
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

# As a part of the timeout: how often a rank that answers is asked again, and how long a process is looked at.
_PAUSE = 0.25


@dataclass(slots=True)
class _Silence:
    """What is known of one rank.

    Attributes:
        question: Not answered yet; None between two questions.
        seconds: Since it was asked, or since it answered.
        look: At its process, under way.
    """

    question: ray.ObjectRef[bool] | None = None
    seconds: float = 0.0
    look: ray.ObjectRef[str | None] | None = None


@dataclass
class SilenceWatch:
    """Asks ranks whether they run, without ever waiting for an answer.

    Attributes:
        actors: Of all ranks.
        facts: Of all ranks.
        neighbour_timeout_seconds: How long a process may be silent and idle.
        runtime_env: Of the actors.
    """

    actors: Sequence[Any]
    facts: Sequence[RankFacts]
    neighbour_timeout_seconds: float
    runtime_env: Mapping[str, Any] | None
    _ranks: dict[int, _Silence] = field(default_factory=dict)
    _checked: float = field(default_factory=time.monotonic)

    def check(self, awaited: Iterable[int]) -> FailedCall | None:
        """The first of the awaited ranks that is silent and idle for too long; called often."""
        now = time.monotonic()
        # In the rest of a long time this process did not run itself.
        elapsed, self._checked = min(now - self._checked, self._pause_seconds), now
        silences = {rank: self._ranks.setdefault(rank, _Silence()) for rank in awaited}
        refs = [ref for silence in silences.values() for ref in (silence.question, silence.look) if ref is not None]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        for rank, silence in silences.items():
            silence.seconds += elapsed
            state = self._listen(rank, silence, done)
            if state is not None:
                return FailedCall(
                    rank,
                    f"its process {self.facts[rank].pid} has answered nothing for {silence.seconds:.1f} s and is {state}, longer "
                    f"than neighbour_timeout_seconds={self.neighbour_timeout_seconds:g}; look at it with py-spy or gdb, or raise "
                    "the setting",
                )
        return None

    @property
    def _pause_seconds(self) -> float:
        return _PAUSE * self.neighbour_timeout_seconds

    def _listen(self, rank: int, silence: _Silence, done: set[ray.ObjectRef[Any]]) -> str | None:
        """What a rank's process is that is silent for too long, and idle."""
        if silence.question is None:
            if silence.seconds >= self._pause_seconds:
                silence.question, silence.seconds = self.actors[rank].is_running.remote(), 0.0
        elif silence.question in done:
            # Dead or alive: of a dead one, the call that is awaited tells.
            self._ranks[rank] = _Silence()
        elif silence.look is None:
            if silence.seconds >= self.neighbour_timeout_seconds:
                silence.look = self._look(rank)
        elif silence.look in done:
            look, silence.look = silence.look, None
            # A node that cannot start the task is Ray's to judge.
            with contextlib.suppress(RayError):
                return ray.get(look)
        return None

    def _look(self, rank: int) -> ray.ObjectRef[str | None]:
        facts = self.facts[rank]
        task: Any = ray.remote(idle_process)
        return task.options(
            name=f"is rank {rank} idle",
            num_cpus=0,
            max_retries=0,
            runtime_env=self.runtime_env,
            scheduling_strategy=NodeAffinitySchedulingStrategy(facts.node_id, soft=False),
        ).remote(facts.pid, facts.process_start, self._pause_seconds)


def idle_process(pid: int, start: str, seconds: float) -> str | None:
    """What a process of this machine is that neither computes nor touches memory for `seconds`; None where it does, or is not seen.

    Args:
        pid: Its number, as its own node shows it.
        start: Its start, see `PeerProcess`: another PID namespace has another process of that number.
        seconds: How long to look.
    """
    process = PeerProcess(pid)
    with contextlib.closing(process):
        if process.start != start:
            return None
        before = process.work()
        threading.Event().wait(seconds)
        is_idle = before is not None and process.work() == before and not process.is_runnable()
        return process.describe() if is_idle else None
