"""How far is the load? One bar over the bytes of all ranks, drawn by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ray_streamer.rank.statistics import RankStatistics


class ProgressBar:
    """A bar for `load_sharded(on_progress=...)`; use it as a context manager.

    Args:
        title: Shown before the bar.
        console: Where to draw; rich draws nothing where nobody looks.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._progress.add_task(printable(title, one_line=True), total=None)

    def __call__(self, ranks: Sequence[RankStatistics | None]) -> None:
        """Shows what the ranks said last; ranks that said nothing yet count for nothing."""
        known = [rank for rank in ranks if rank is not None]
        total = sum(rank.bytes_to_deliver for rank in known)
        # A total is known when every rank has its plan; until then the bar only moves.
        self._progress.update(
            self._task,
            completed=sum(rank.bytes_delivered for rank in known),
            total=total if known and len(known) == len(ranks) else None,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
