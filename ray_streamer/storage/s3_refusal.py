"""What does an answer mean that brings no bytes: a fault that may pass, or which error, with which advice?

Statuses and codes: Amazon S3 API Reference, "Error responses"; codes of other stores where their manuals have some. S3's own
message is repeated, since the code alone rarely says enough; see `redaction` for what is left out of it.
"""

from __future__ import annotations

import html
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import (
    AccessError,
    ObjectChangedError,
    ObjectMissingError,
    ShortReadError,
    StorageError,
    ThrottledError,
)
from ray_streamer.storage.http_date import parse_http_date
from ray_streamer.storage.redaction import NO_SECRETS, Secrets
from ray_streamer.storage.retry import PassingFault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from botocore.exceptions import ClientError

    from ray_streamer.storage.http_connection import HttpAnswer

MAX_ERROR_BYTES = 64 << 10
"""So much of an answer's body is looked at."""

_THROTTLE_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServiceUnavailable"}
)
_TOKEN_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
# Amazon says so for absent keys too, and servers that answer without a body may mean it.
_HIDING_CODES = frozenset({"AccessDenied", "Forbidden", ""})
_NOT_LISTED = "without s3:ListBucket an object that does not exist looks like this, too"
_IN_THE_HOST_NAME = "this store takes buckets in the host name only; set s3_addressing to virtual"
_ADVICE = {
    "InvalidObjectState": "the object is archived; restore it, or copy it to a storage class that can be read at once",
    "SignatureDoesNotMatch": "check the secret key, and that no proxy changes the request",
    "InvalidAccessKeyId": "check the access key, and that it belongs to this endpoint",
    # Alibaba OSS, Tencent COS and Volcengine TOS
    "SecondLevelDomainForbidden": _IN_THE_HOST_NAME,
    "PathStyleDomainForbidden": _IN_THE_HOST_NAME,
    "InvalidPathAccess": _IN_THE_HOST_NAME,
}
_LONG_SKEW_SECONDS = 300.0
_MAX_RETRY_AFTER_SECONDS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer other than success; every text is safe to show.

    Attributes:
        status: HTTP status.
        code: S3's word for it; empty when the answer had no body.
        message: S3's sentence about it; may be empty.
        request_id: What the server's operator can look up.
        region: Where the bucket is, when the server said so.
        endpoint: Where the server wants to be asked, when it said so.
        retry_after: The server's wish about the next attempt, as it came.
        skew_seconds: How far this machine's clock is ahead of the server's.
    """

    status: int
    code: str
    message: str = ""
    request_id: str = ""
    region: str = ""
    endpoint: str = ""
    retry_after: str = ""
    skew_seconds: float = field(default=0.0, compare=False)

    @classmethod
    def from_answer(cls, answer: HttpAnswer, body: bytes) -> Refusal:
        """What a raw answer says, with the beginning of its body."""
        text, secrets = body.decode("utf-8", "replace"), answer.secrets
        date = parse_http_date(answer.header("date"))
        return cls(
            status=answer.status,
            code=_element(text, "Code", secrets, r"[\w.-]{1,100}"),
            message=_element(text, "Message", secrets, r".+").rstrip("."),
            request_id=secrets.clean(answer.header("x-amz-request-id"), max_chars=128),
            region=secrets.clean(answer.header("x-amz-bucket-region"), max_chars=64)
            or _element(text, "Region", secrets, r"[\w-]+"),
            endpoint=_element(text, "Endpoint", secrets, r"[\w.:/-]+"),
            retry_after=answer.header("retry-after"),
            skew_seconds=time.time() - date if date is not None else 0.0,
        )

    @classmethod
    def from_client_error(cls, error: ClientError) -> Refusal:
        """What an answer says that botocore read; its message is left out, since nobody knows what it was signed with."""
        response: Mapping[str, Any] = error.response
        metadata = response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        code = str(response.get("Error", {}).get("Code", ""))
        return cls(
            status=int(metadata.get("HTTPStatusCode", 0)),
            # Of an answer without a body botocore makes the status the code.
            code="" if code.isdigit() else NO_SECRETS.clean(code),
            request_id=NO_SECRETS.clean(str(metadata.get("RequestId", headers.get("x-amz-request-id", "")))),
            region=NO_SECRETS.clean(str(headers.get("x-amz-bucket-region", ""))),
            retry_after=str(headers.get("retry-after", "")),
        )

    def error(self, what: str, *, is_object: bool = True) -> StorageError | PassingFault:
        """The exception to raise for an answer about `what`, an object or else a listing."""
        message = f"{what}: {self}"
        if self.status in (401, 403) or self.code in _TOKEN_CODES:
            # A signature may have expired, or credentials may have changed, since the url was made.
            return PassingFault(
                f"access refused, {message}{self._advice(is_object=is_object)}",
                error_class=AccessError,
                is_worth_one_retry=True,
            )
        if self.status == 429 or self.code in _THROTTLE_CODES or self.status == 503:
            return PassingFault(
                f"the store asks to slow down, {message}",
                error_class=ThrottledError,
                retry_after_seconds=seconds_until(self.retry_after),
            )
        if self.status in (408, 500, 502, 504) or self.code in ("RequestTimeout", "InternalError"):
            return PassingFault(f"the store failed, {message}")
        return self._lasting_error(message)

    def _lasting_error(self, message: str) -> StorageError:
        if self.status == 404:
            missing = "bucket" if self.code == "NoSuchBucket" else "object"
            return ObjectMissingError(f"no such {missing}, {message}")
        if self.status == 412:
            return ObjectChangedError(f"the object is not the one that the index saw, {message}")
        if self.status == 416:
            return ShortReadError(f"the object ends before the extent begins, {message}")
        if self.status == 407:
            return AccessError(f"the proxy wants to know who asks, {message}; put user and password into HTTP_PROXY")
        if self.region:
            return StorageError(f"the bucket is in region {self.region}; set s3_region, {message}")
        return StorageError(f"the store refused, {message}{self._advice(is_object=True)}")

    @property
    def _may_be_missing(self) -> bool:
        return self.status == 403 and self.code in _HIDING_CODES

    def _advice(self, *, is_object: bool) -> str:
        advice = []
        if self.code == "RequestTimeTooSkewed" or abs(self.skew_seconds) > _LONG_SKEW_SECONDS:
            advice.append(self._skew())
        if self.code in _ADVICE:
            advice.append(_ADVICE[self.code])
        elif re.search(r"virtual.?host", self.message, re.IGNORECASE):
            advice.append(_IN_THE_HOST_NAME)
        if self.code.upper().startswith("KMS") or "kms:" in self.message.lower():
            advice.append("reading needs kms:Decrypt on the key that encrypts the object")
        if self.endpoint:
            advice.append(f"the store wants to be asked at {self.endpoint}; set s3_endpoint_url or s3_region")
        if self._may_be_missing and not self.message.lower().count("kms:"):
            advice.append(_NOT_LISTED if is_object else "listing needs s3:ListBucket")
        return "".join(f"; {sentence}" for sentence in advice)

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


def _element(text: str, name: str, secrets: Secrets, form: str) -> str:
    """The first element of that name in an XML body, if it has this form; safe to show."""
    match = re.search(rf"<{name}>([^<]*)</{name}>", text)
    if match is None:
        return ""
    content = secrets.clean(html.unescape(match[1]))
    return content if re.fullmatch(form, content) else ""
