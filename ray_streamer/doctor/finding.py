"""What was found, why does it matter, and what is to be done?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray_streamer.errors import RayStreamerError

Level = Literal["good", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What was looked at, in one or two words.
        level: "error" when a load will fail, "warning" when it may, or will be slow.
        found: What is so.
        why: Why it matters; empty when all is well.
        advice: What to do; empty when nothing is.
    """

    subject: str
    level: Level
    found: str
    why: str = ""
    advice: str = ""


def failed(subject: str, error: RayStreamerError) -> Finding:
    """What was tried failed as a load would: the error says the rest."""
    return Finding(
        subject=subject,
        level="error",
        found=str(error),
        why="A load fails at the same point.",
        advice="The message says what to change.",
    )
