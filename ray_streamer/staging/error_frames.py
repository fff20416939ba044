"""What memory does an error keep alive? The frames of the calls that it ended, and in them views that keep arenas mapped."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_OWN_CODE = str(Path(__file__).parents[1])


def clear_frames(error: BaseException | None) -> None:
    """Drops the variables of ended calls that this package made, which somebody who keeps the error would keep too."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _clear(frame)
            _clear_own_callers(frame.f_back)
        error = error.__cause__ or error.__context__


def _clear_own_callers(frame: FrameType | None) -> None:
    """Who called this package may be in the middle of something, such as a suspended generator."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OWN_CODE):
            _clear(frame)
        frame = frame.f_back


def _clear(frame: FrameType) -> None:
    with contextlib.suppress(RuntimeError):  # it runs still
        frame.clear()
