"""When is a token renewed, and what if that fails?

Shortly before the token's end one thread renews it, and the others go on with it. If that fails the token stays in use while it is
good, and is renewed some seconds later. Where no token is good all threads wait for one renewal, and hear of its failure.
"""

from __future__ import annotations

import logging
import threading
import time
from enum import Enum, auto
from typing import TYPE_CHECKING

from ray_streamer.errors import CredentialsError
from ray_streamer.storage.bounded_call import OneAtATime

if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class Freshness(Enum):
    """How good a token is."""

    FRESH = auto()
    ENDS_SOON = auto()
    ENDED = auto()
    """Or refused, or there is none yet."""


class Renewal:
    """Renews a token in time; safe to call from many threads.

    Args:
        freshness: Of the token at hand.
        renew: Gets another one.
    """

    def __init__(self, freshness: Callable[[], Freshness], renew: Callable[[], None]) -> None:
        self._freshness = freshness
        self._renew = renew
        self._renewing_early = threading.Lock()
        self._next_early_at = 0.0
        self._has_warned = False
        self.finding = OneAtATime()
        """Whose turn it is to change the token, or what is known about it."""

    def ensure(self) -> None:
        """Returns when the token at hand is good.

        Raises:
            CredentialsError: It is not, and there is no other one.
            SettingsError: The library that gives tokens is not installed.
        """
        freshness = self._freshness()
        if freshness is Freshness.ENDS_SOON:
            self._renew_early()
        elif freshness is Freshness.ENDED:
            with self.finding.turn():
                if self._freshness() is Freshness.ENDED:
                    self._renew()

    def _renew_early(self) -> None:
        if time.monotonic() < self._next_early_at or not self._renewing_early.acquire(blocking=False):
            return
        try:
            with self.finding.turn():
                if self._freshness() is not Freshness.FRESH:
                    self._renew()
            self._has_warned = False
        except CredentialsError as error:
            if self._freshness() is Freshness.ENDED:
                raise
            self._next_early_at = time.monotonic() + _PAUSE_SECONDS
            if not self._has_warned:
                self._has_warned = True
                _logger.warning("%s; the token at hand is still good, and will be renewed later", error)
        finally:
            self._renewing_early.release()
