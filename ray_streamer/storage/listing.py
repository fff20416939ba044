"""Which keys does a store list, and when does a listing have no end?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import StorageError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PAGE_BYTES = 4 << 20
"""Longer than any page of 1000 keys in XML, which is read without a tree."""

MAX_JSON_BYTES = 1 << 20
"""Longer than any page of 1000 names in JSON, of which values are made that take up to forty times the memory."""

# A page has up to 1000 entries, folders included.
_MAX_PAGES = 200
_MAX_KEYS = 100_000
_MAX_KEY_CHARS = 8 << 20
MAX_TOKEN_CHARS = 8192
"""Longer than any continuation token."""


@dataclass(frozen=True, slots=True)
class ListingPage:
    """One answer.

    Attributes:
        keys: In the order of the answer.
        next_token: What the next request names; empty after the last page.
    """

    keys: tuple[str, ...]
    next_token: str


def list_keys(ask: Callable[[str, float], ListingPage], *, what: str, timeout_seconds: float) -> list[str]:
    """The keys of all pages.

    Args:
        ask: Gives the page of a continuation token, the first one's being empty. It tries again no later than its second argument says, a
            time of `time.monotonic`.
        what: The listing, for messages.
        timeout_seconds: No page is asked for later than that after the first.

    Raises:
        StorageError: The listing goes round in circles, never ends, or takes too long; or what `ask` raises.
    """
    ends_at = time.monotonic() + timeout_seconds
    keys: list[str] = []
    # Hashes: tokens may be long.
    seen: set[int] = set()
    num_chars = 0
    token = ""
    while True:
        page = ask(token, ends_at)
        keys += page.keys
        token = page.next_token
        if not token:
            return keys
        if hash(token) in seen:
            raise StorageError(f"{what}: the store repeats a continuation token after {counted(len(keys), 'key')}")
        seen.add(hash(token))
        num_chars += sum(map(len, page.keys))
        if len(seen) >= _MAX_PAGES or len(keys) > _MAX_KEYS or num_chars > _MAX_KEY_CHARS:
            raise StorageError(
                f"{what}: there is more after {counted(len(seen), 'page')} and {counted(len(keys), 'key')}; is this the folder of one checkpoint?"
            )
        if time.monotonic() >= ends_at:
            raise StorageError(
                f"{what}: the listing has no end in {timeout_seconds:g} s (list_timeout_seconds), after "
                f"{counted(len(seen), 'page')} and {counted(len(keys), 'key')}"
            )
