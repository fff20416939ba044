"""What is the date of an HTTP header? Servers write whatever they like there (RFC 9110, section 5.6.7, says what they should)."""

from __future__ import annotations

import datetime
import time
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache

_MAX_CHARS = 64
# Each answer about one object tells one `Last-Modified`.
_MAX_KNOWN_DATES = 256


def http_date_now() -> str:
    """This second."""
    return _http_date(int(time.time()))


@lru_cache(maxsize=1)
def _http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


def parse_http_date(text: str) -> float | None:
    """Seconds since 1970; None for what is no date.

    >>> parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT")
    784111777.0
    """
    return _parsed(text) if 0 < len(text) <= _MAX_CHARS else None


@lru_cache(_MAX_KNOWN_DATES)
def _parsed(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        return date.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
