"""What does an answer mean that brings no bytes: a fault that may pass, or which error, with which advice?

What all stores have in common, by HTTP's own statuses (RFC 9110, section 15). Codes and advice of one store are a subclass of
`Refusal` beside that store. A server's own message is repeated, since the status alone rarely says enough; see `redaction` for
what is left out of it.
"""

from __future__ import annotations

import html
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ray_streamer.errors import (
    AccessError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    ShortReadError,
    StorageError,
    ThrottledError,
)
from ray_streamer.storage.http_date import parse_http_date
from ray_streamer.storage.retry import PassingFault

if TYPE_CHECKING:
    from ray_streamer.storage.redaction import Secrets

MAX_ERROR_BYTES = 64 << 10
"""So much of an answer's body is looked at."""

# From 520 on: what Cloudflare says in place of 500 and 504 when the server behind it fails.
_FAILURES = frozenset({408, 500, 502, 504, *range(520, 525), 527})
_LONG_SKEW_SECONDS = 300.0
_MAX_RETRY_AFTER_SECONDS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer other than success; every text is safe to show.

    Attributes:
        status: HTTP status.
        code: The store's word for it; empty when the answer had no body.
        message: The store's sentence about it; may be empty.
        request_id: What the server's operator can look up.
        retry_after: The server's wish about the next attempt, as it came.
        skew_seconds: How far this machine's clock is ahead of the server's.
    """

    THROTTLE_CODES: ClassVar[frozenset[str]] = frozenset()
    CREDENTIALS_CODES: ClassVar[frozenset[str]] = frozenset()
    FAILURE_CODES: ClassVar[frozenset[str]] = frozenset()
    SKEW_CODES: ClassVar[frozenset[str]] = frozenset()

    status: int
    code: str = ""
    message: str = ""
    request_id: str = ""
    retry_after: str = ""
    skew_seconds: float = field(default=0.0, compare=False)

    def error(self, what: str, *, is_object: bool = True) -> StorageError | PassingFault:
        """The exception to raise for an answer about `what`, an object or else a listing."""
        message = f"{what}: {self}"
        if self.status in (401, 403) or self.code in self.CREDENTIALS_CODES:
            # A signature may have expired, or credentials may have changed, since the request was authorised.
            return PassingFault(
                f"access refused, {message}{self._advice(is_object=is_object)}",
                error_class=CredentialsError if self.code in self.CREDENTIALS_CODES | self.SKEW_CODES else AccessError,
                is_worth_one_retry=True,
            )
        if self.status == 429 or self.code in self.THROTTLE_CODES or self.status == 503:
            return PassingFault(
                f"the store asks to slow down, {message}",
                error_class=ThrottledError,
                retry_after_seconds=seconds_until(self.retry_after),
            )
        if self.status in _FAILURES or self.code in self.FAILURE_CODES:
            return PassingFault(f"the store failed, {message}")
        return self.lasting_error(message)

    def lasting_error(self, message: str) -> StorageError:
        """The error of an answer that will not change; `message` says what it is about and what was said."""
        if self.status == 404:
            return ObjectMissingError(f"no such {self.what_is_missing}, {message}")
        if self.status == 412:
            return ObjectChangedError(f"the object is not the one that the index saw, {message}")
        if self.status == 416:
            return ShortReadError(f"the object ends before the extent begins, {message}")
        if self.status == 407:
            return AccessError(f"the proxy wants to know who asks, {message}; put user and password into HTTP_PROXY")
        return StorageError(f"the store refused, {message}{self._advice(is_object=True)}")

    @property
    def what_is_missing(self) -> str:
        """What 404 says is not there."""
        return "object"

    def advice(self, *, is_object: bool) -> list[str]:
        """What the store's codes and words suggest to do, about an object or else a listing."""
        return []

    def _advice(self, *, is_object: bool) -> str:
        is_skewed = self.code in self.SKEW_CODES or abs(self.skew_seconds) > _LONG_SKEW_SECONDS
        advice = [self._skew()] if is_skewed else []
        return "".join(f"; {sentence}" for sentence in advice + self.advice(is_object=is_object))

    def _skew(self) -> str:
        if not self.skew_seconds:
            return "set this machine's clock, which is wrong"
        hours, minutes = divmod(round(abs(self.skew_seconds) / 60), 60)
        amount = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        return (
            f"this machine's clock is {amount} {'ahead of' if self.skew_seconds > 0 else 'behind'} the store's; set it"
        )

    def __str__(self) -> str:
        code = self.code or "without a code"
        message = f" ({self.message})" if self.message else ""
        return f"HTTP {self.status} {code}{message}, request id {self.request_id or 'unknown'}"


def seconds_until(retry_after: str) -> float:
    """The meaning of a Retry-After header, seconds or a date (RFC 9110, section 10.2.3); 0 when it has none.

    >>> seconds_until("120"), seconds_until("soon"), seconds_until("9" * 5000)
    (120.0, 0.0, 1000000000.0)
    """
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after) if len(retry_after) < 10 else _MAX_RETRY_AFTER_SECONDS
    date = parse_http_date(retry_after)
    return min(max(0.0, date - time.time()), _MAX_RETRY_AFTER_SECONDS) if date is not None else 0.0


def skew_of(date: str) -> float:
    """How far this machine's clock is ahead of a `Date` header; 0 when it is none."""
    seconds = parse_http_date(date)
    return time.time() - seconds if seconds is not None else 0.0


def xml_element(text: str, name: str, secrets: Secrets, form: str) -> str:
    """The first element of that name in an XML body, if it has this form; safe to show."""
    match = re.search(rf"<{name}>([^<]*)</{name}>", text)
    if match is None:
        return ""
    content = secrets.clean(html.unescape(match[1]))
    return content if re.fullmatch(form, content) else ""
