"""Which ranks run a function of the caller's, and who waits for its end? A rank does one thing at a time, and that may take as long as it likes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import ray

from ray_streamer.cluster.waiting import SLOW_START_SECONDS, News
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)


class CallersFunctions:
    """The functions that the caller's calls began on ranks, also those that nobody waits for any more, as after an interrupt."""

    def __init__(self) -> None:
        self._ranks: dict[ray.ObjectRef[Any], int] = {}

    def add(self, rank: int, ref: ray.ObjectRef[Any]) -> None:
        """A call was sent to a rank; `ref` is its answer."""
        self._ranks[ref] = rank

    def forget_ended(self) -> None:
        """Lets go of the answers that have come."""
        refs = list(self._ranks)
        if refs:
            for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
                self._ranks.pop(ref, None)  # Another thread may have looked, too.

    def why_silent(self, ranks: Sequence[int], *, but: Sequence[ray.ObjectRef[Any]] = ()) -> str | None:
        """Which of these ranks do not answer since they run such a function, and what to do; None where there are none.

        Args:
            ranks: Those that somebody waits for.
            but: The answers that are waited for.
        """
        self.forget_ended()
        running = {rank for ref, rank in list(self._ranks.items()) if ref not in but}
        found = [str(rank) for rank in sorted(running.intersection(ranks))]
        if not found:
            return None
        who = f"Rank {found[0]} runs" if len(found) == 1 else f"Ranks {listed(found)} run"
        return f"{who} the caller's function (model.run), and other calls wait for its end; let it return first"


class WaitForFunctions:
    """Tells while a call waits for functions of the caller's.

    Args:
        functions: Those of the group.
        doing: The call.
        label: What the ranks hold.
    """

    def __init__(self, functions: CallersFunctions, doing: str, label: str) -> None:
        self._functions, self._doing, self._label = functions, doing, label
        self._news = News(SLOW_START_SECONDS)

    def tell(self, ranks: Sequence[int], refs: Sequence[ray.ObjectRef[Any]]) -> None:
        """Warns from time to time where one of `ranks`, whose answers `refs` are awaited, runs a function of an earlier call."""
        if self._news.is_due():
            why = self._functions.why_silent(ranks, but=refs)
            if why is not None:
                logger.warning(
                    "%s: a call (%s) has waited for %.0f s. %s",
                    self._label,
                    self._doing,
                    self._news.waited_seconds,
                    why,
                )
