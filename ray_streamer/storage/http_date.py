"""When is the date of an HTTP header? Servers write whatever they like there (RFC 9110, section 5.6.7, says what they should)."""

from __future__ import annotations

import datetime
from email.utils import parsedate_to_datetime

_MAX_CHARS = 64


def parse_http_date(text: str) -> float | None:
    """Seconds since 1970; None for what is no date.

    >>> parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT")
    784111777.0
    """
    if not 0 < len(text) <= _MAX_CHARS:
        return None
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        return date.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
