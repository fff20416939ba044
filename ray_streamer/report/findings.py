"""What does a report say beside its counts? Verdict, timeline, kinds of tensors; and, where something cannot be told, why not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.report.tensor_kinds import KindReads
    from ray_streamer.report.timeline import Timeline
    from ray_streamer.report.verdict.judge import Verdict

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found out about a finished load.

    Attributes:
        verdict: Why it took that long; None where nothing was read or copied, or where `untold` says why.
        timeline: What the ranks of the node that took longest did, and when; None as above.
        tensor_kinds: Bytes by kind of tensor; None where this process cannot make the plan.
        untold: What cannot be told, and why, one sentence each.
    """

    verdict: Verdict | None = None
    timeline: Timeline | None = None
    tensor_kinds: tuple[KindReads, ...] | None = None
    untold: tuple[str, ...] = ()


class Finder:
    """Finds one thing after the other. A fault in looking at a load is reported, and does not end a load that succeeded.

    Attributes:
        untold: What could not be found, and why, one sentence each.
    """

    def __init__(self) -> None:
        self.untold: list[str] = []

    def find(self, what: str, look: Callable[[], _Found]) -> _Found | None:
        """What `look` gives; None where it fails.

        Args:
            what: Is looked for, such as "the verdict".
            look: Finds it.
        """
        try:
            return look()
        except Exception as error:
            # Any fault: whoever has loaded a model must not lose it to a sentence about it.
            logger.info("%s could not be found", what, exc_info=True)
            self.untold.append(
                f"No word on {what}: a fault of ray_streamer, not of the load ({type(error).__name__}: {error})."
            )
            return None
