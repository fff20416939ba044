"""Is a rank that others wait for alive, and does it get on? Judged by what it says, and by what the kernel shows of it.

A rank's session thread sends a PULSE about once a second, whatever its other threads do. Three things end the waiting:

silent and idle     no message for `neighbour_seconds`, and its process neither computes nor touches memory: stopped, or hung
silent and busy     no message for `progress_seconds`, though its process works: something keeps Python's lock all the time
talks, but is stuck its own work makes no step for `progress_seconds`: a storage or a device that hangs

Time counts only while the watching process itself runs, so that a container that was frozen as a whole goes on afterwards.
A rank that waits for others is never blamed: whoever it waits for is.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.exchange.messages import Pulse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.exchange.peer import PeerProcess
    from ray_streamer.settings import Settings

_MAX_PULSE_SECONDS = 1.0
_PULSES_BEFORE_A_LOOK = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long ranks of a node wait for each other; see `docs/waits.md`.

    Attributes:
        startup_seconds: For ranks that did not come yet.
        neighbour_seconds: For a rank that came and is silent and idle.
        progress_seconds: For one step of a rank that others wait for.
    """

    startup_seconds: float
    neighbour_seconds: float
    progress_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> Timeouts:
        """As the settings say."""
        return cls(
            startup_seconds=settings.startup_timeout_seconds,
            neighbour_seconds=settings.neighbour_timeout_seconds,
            progress_seconds=settings.progress_timeout_seconds,
        )

    @property
    def pulse_seconds(self) -> float:
        """Between two pulses: several fit into the shortest silence that counts."""
        return min(_MAX_PULSE_SECONDS, self.neighbour_seconds / 6, self.progress_seconds / 6)


class Activity:
    """What this rank does, counted by its own threads and told to the others; safe to use from many threads.

    Attributes:
        phase: What the rank does, in words.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_steps = 0
        self._num_busy = 1  # whoever made this
        self.phase = "starting"

    def begin(self) -> None:
        """A piece of work is under way."""
        with self._lock:
            self._num_busy += 1

    def end(self) -> None:
        """A piece of work is over, however it ended."""
        with self._lock:
            self._num_busy -= 1
            self._num_steps += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """For the length of the block the calling thread has a piece of work under way."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the length of the block the calling thread has nothing to do but wait for others."""
        with self._lock:
            self._num_busy -= 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy += 1
                self._num_steps += 1

    def pulse(self) -> Pulse:
        """What is told to the others now."""
        with self._lock:
            return Pulse(self._num_steps, self._num_busy > 0, self.phase)


class Watch:
    """What one other rank showed of itself while it was awaited.

    Attributes:
        process: Its process.
    """

    def __init__(self, process: PeerProcess, timeouts: Timeouts) -> None:
        self.process = process
        self._timeouts = timeouts
        self._silent_seconds = 0.0
        self._idle_seconds = 0.0
        self._stuck_seconds = 0.0
        self._work: tuple[str, ...] | None = None
        self._pulse = Pulse(0, False, "starting")

    @property
    def is_stuck_waiting(self) -> bool:
        """Whether it only waited, and did nothing else, for as long as any step may take."""
        return not self._pulse.is_busy and self._stuck_seconds >= self._timeouts.progress_seconds

    def hear(self, pulse: Pulse | None = None) -> None:
        """It said something."""
        self._silent_seconds = self._idle_seconds = 0.0
        self._work = None
        if pulse is not None:
            if (pulse.num_steps, pulse.is_busy) != (self._pulse.num_steps, self._pulse.is_busy):
                self._stuck_seconds = 0.0
            self._pulse = pulse

    def tick(self, seconds: float) -> str | None:
        """`seconds` more of waiting; why the rank is given up, or None while it is not."""
        self._silent_seconds += seconds
        self._stuck_seconds += seconds
        if self._silent_seconds > _PULSES_BEFORE_A_LOOK * self._timeouts.pulse_seconds:
            self._look(seconds)
        neighbour_seconds, progress_seconds = self._timeouts.neighbour_seconds, self._timeouts.progress_seconds
        if self._silent_seconds >= neighbour_seconds and self._idle_seconds >= neighbour_seconds / 2:
            return (
                f"its process {self.process.pid} has said nothing for {self._silent_seconds:.1f} s and is "
                f"{self.process.describe()}, longer than neighbour_timeout_seconds={neighbour_seconds:g}; look at it with "
                f"py-spy or gdb, or raise the setting"
            )
        if self._silent_seconds >= progress_seconds:
            return (
                f"its process {self.process.pid} has said nothing for progress_timeout_seconds={progress_seconds:g}, though "
                "it is not known to be idle; look for a call that keeps Python's lock, or raise the setting"
            )
        if self._pulse.is_busy and self._stuck_seconds >= progress_seconds:
            return (
                f"its process {self.process.pid} has made no progress for progress_timeout_seconds={progress_seconds:g} while "
                f"{self._pulse.phase}; look for a storage or a device that hangs, or raise the setting"
            )
        return None

    def _look(self, seconds: float) -> None:
        work = self.process.work()
        # A process that waits for a CPU is not idle, however long the machine lets it wait.
        is_idle = work is not None and work == self._work and not self.process.is_runnable()
        self._work = work
        self._idle_seconds = self._idle_seconds + seconds if is_idle else 0.0
