"""How does an error of this package look in a notebook? The sentence comes last, under the caller's own line.

Frames inside of this package say nothing to who typed a wrong path. They are logged at level DEBUG.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ray_streamer.errors import RankFailedError, RayStreamerError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def with_few_frames(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose `RayStreamerError`s are raised anew, without frames and causes that add nothing."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RayStreamerError as error:
            logger.debug("%s failed", function.__name__, exc_info=True)
            raise error.with_traceback(None) from _unforeseen(error)

    return call


def _unforeseen(error: RayStreamerError) -> BaseException | None:
    """The cause that has more to tell than the error's own sentence: an exception of the caller's code on a rank."""
    if isinstance(error, RankFailedError) and isinstance(error.cause, BaseException):
        return None if isinstance(error.cause, RayStreamerError | OSError) else error.cause
    return None
