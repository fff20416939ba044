"""When does the signature of an address end? Stores write it into the query; the answer to an ended one seldom says so.

Sources: Amazon S3 API Reference, "Authenticating requests: using query parameters"; Google Cloud Storage, "V4 signed URLs"; Azure Storage
REST API, "Create a service SAS"; Amazon CloudFront Developer Guide, "Use signed URLs".
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

_DAY_FORMS = ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%MZ", "%Y-%m-%d")
_STAMP_FORM = "%Y%m%dT%H%M%SZ"
_LATEST = 1e11
"""In the year 5138; a number beyond is no time in seconds."""


def signature_end(url: str) -> float | None:
    """Seconds since 1970; None where the address does not say.

    >>> signature_end("https://host/a?se=2026-11-28T19%3A00%3A00Z&sig=x") == signature_end("https://host/a?Expires=1795892400&Signature=x")
    True
    >>> signature_end("https://host/a?X-Amz-Date=20261128T180000Z&X-Amz-Expires=3600") == signature_end("https://host/a?se=2026-11-28T19:00Z")
    True
    """
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    for store in ("amz", "goog"):
        signed = _moment(query.get(f"x-{store}-date", ""), (_STAMP_FORM,))
        seconds = _number(query.get(f"x-{store}-expires", ""))
        if signed is not None and seconds is not None:
            return signed + seconds
    if "se" in query:
        return _moment(query["se"], _DAY_FORMS)
    return _number(query.get("expires", ""))


def ended_signature(url: str, *, skew_seconds: float) -> tuple[str, ...]:
    """What to do, in one sentence, when the signature of an address has ended; nothing when it has not, or does not say.

    Args:
        url: The address; nothing of it but the time is repeated.
        skew_seconds: How far this machine's clock is ahead of the server's, whose clock counts.
    """
    end = signature_end(url)
    if end is None or end > time.time() - skew_seconds:
        return ()
    return (
        f"the signature of the address ended at {datetime.fromtimestamp(end, UTC):%Y-%m-%dT%H:%M:%SZ}: sign it again, for longer than a "
        "load takes",
    )


def _moment(text: str, forms: tuple[str, ...]) -> float | None:
    for form in forms:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except (ValueError, OverflowError):
            continue
    return None


def _number(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 12 and float(text) < _LATEST else None
