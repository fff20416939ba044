"""How far is the load? A bar where somebody looks, a line every few seconds where it is a log: from the call to the last byte.

terminal, notebook          rich's bar, also while Ray starts and ranks plan
`ray job logs`, files       ray_streamer: s3://bucket/model: 3.1 GiB of 15 GiB, 1.25 GB/s, 10 s left, 2 of 8 ranks done
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ray_streamer.units import counted, human_bytes, human_rate
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_streamer.rank.statistics import RankStatistics

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_POLL_SECONDS = 0.25

_PHASES = {
    "check": "looking at the checkpoint",
    "ray": "starting Ray, or connecting to it",
    "start": "starting the ranks' processes",
    "plan": "ranks meet and plan",
    "load": "loading",
}


class ProgressSoFar(NamedTuple):
    """How far all ranks are together.

    Attributes:
        delivered_bytes: In tensors.
        all_bytes: What that will be at the end; 0 until every rank knows.
        num_ranks: All ranks.
        num_done: Ranks that have all their tensors.
        num_retries: Requests that were sent again.
    """

    delivered_bytes: int = 0
    all_bytes: int = 0
    num_ranks: int = 0
    num_done: int = 0
    num_retries: int = 0

    @classmethod
    def of(cls, ranks: Sequence[RankStatistics | None]) -> Self:
        """The sum of what ranks said last; ranks that said nothing yet count for nothing."""
        known = [rank for rank in ranks if rank is not None]
        return cls(
            delivered_bytes=sum(rank.bytes_delivered for rank in known),
            # A total is known when every rank has its plan.
            all_bytes=sum(rank.bytes_to_deliver for rank in known) if len(known) == len(ranks) else 0,
            num_ranks=len(ranks),
            num_done=sum(rank.bytes_delivered >= rank.bytes_to_deliver for rank in known),
            num_retries=sum(rank.storage.num_retries for rank in known),
        )

    @property
    def notes(self) -> str:
        """What a bar does not show."""
        told = [f"{self.num_done} of {counted(self.num_ranks, 'rank')} done"] if self.num_ranks > 1 else []
        if self.num_retries:
            told.append(counted(self.num_retries, "retry", "retries"))
        return ", ".join(told)


def progress_line(reached: ProgressSoFar, seconds: float) -> str:
    """How far a load is, and how much longer it will take at this rate.

    Args:
        reached: How far it is.
        seconds: Since its first byte might have come.

    >>> progress_line(ProgressSoFar(3 << 30, 12 << 30, 8, 2, 1), 3.0)
    '3 GiB of 12 GiB, 1.07 GB/s, 9 s left, 2 of 8 ranks done, 1 retry'
    """
    rate = reached.delivered_bytes / seconds if seconds > 0 else 0.0
    told = [human_bytes(reached.delivered_bytes)]
    if reached.all_bytes:
        told = [f"{told[0]} of {human_bytes(reached.all_bytes)}"]
    if rate:
        told.append(human_rate(rate))
        if reached.all_bytes > reached.delivered_bytes:
            told.append(f"{(reached.all_bytes - reached.delivered_bytes) / rate:.0f} s left")
    return ", ".join([*told, reached.notes] if reached.notes else told)


class LoadProgress:
    """Shows one load; use it as a context manager, and as `on_progress` of `load_sharded`.

    Where it cannot be shown, as on a closed pipe, the load goes on without.

    Args:
        title: Shown before everything, such as the uri.
        console: Where to show it; stderr when unset.
        ask: Says how far the ranks are, where nobody calls this.
        seconds_between_lines: In logs.
    """

    def __init__(
        self,
        title: str,
        *,
        console: Console | None = None,
        ask: Callable[[], Sequence[RankStatistics | None]] | None = None,
        seconds_between_lines: float = _SECONDS_BETWEEN_LINES,
    ) -> None:
        self._title = printable(title, one_line=True)
        self._console = console or Console(stderr=True, markup=False, highlight=False)
        self._ask = ask
        self._seconds_between_lines = seconds_between_lines
        self._phase = ""
        self._phase_began = time.monotonic()
        self._reached = ProgressSoFar()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Progress | None = None
        self._is_broken = False
        if (self._console.is_terminal and not self._console.is_dumb_terminal) or self._console.is_jupyter:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(True))
            more = (TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[notes]}", markup=False))
            self._bar = Progress(*columns, *more, console=self._console, transient=True)
            self._task = self._bar.add_task(self._title, total=None, notes="")

    def phase(self, name: str) -> None:
        """The load is in another phase from now on; names are those of `LoadReport.seconds`."""
        self._phase, self._phase_began = _PHASES.get(name, name), time.monotonic()
        self._draw()

    def __call__(self, ranks: Sequence[RankStatistics | None]) -> None:
        """Shows what the ranks said last."""
        self._reached = ProgressSoFar.of(ranks)
        self._draw()

    def line(self) -> str:
        """What is known now, on one line."""
        seconds = time.monotonic() - self._phase_began
        if self._reached.delivered_bytes:
            return f"ray_streamer: {self._title}: {progress_line(self._reached, seconds)}"
        phase = f"{self._phase}, " if self._phase else ""
        return f"ray_streamer: {self._title}: {phase}{seconds:.0f} s"

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._show(self._bar.start)
        if self._bar is None or self._ask is not None:
            self._thread = threading.Thread(target=self._watch, name="ray_streamer-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._show(self._bar.stop)

    def _watch(self) -> None:
        """Asks, and writes lines; in a thread of its own, since phases may last long without a word."""
        next_line = time.monotonic() + self._seconds_between_lines
        while not self._is_over.wait(min(_POLL_SECONDS, self._seconds_between_lines)):
            if self._ask is not None:
                self(self._ask())
            if self._bar is None and time.monotonic() >= next_line:
                self._show(lambda: self._console.print(self.line(), soft_wrap=True))
                next_line = time.monotonic() + self._seconds_between_lines

    def _show(self, write: Callable[[], object]) -> None:
        if self._is_broken:
            return
        try:
            write()
        except (Exception, SystemExit) as error:
            # rich ends the program when its pipe is closed; this one has a model to load.
            self._is_broken = True
            logger.warning("the load goes on, but its progress can be shown no longer: %r", error)

    def _draw(self) -> None:
        bar = self._bar
        if bar is not None:
            self._show(lambda: self._update(bar))

    def _update(self, bar: Progress) -> None:
        reached = self._reached
        bar.update(
            self._task,
            description=f"{self._title} ({self._phase})" if self._phase else self._title,
            completed=reached.delivered_bytes,
            total=reached.all_bytes or None,
            notes=reached.notes,
        )
