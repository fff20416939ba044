"""What does an S3 server's answer mean: the bytes that were asked for, a fault that may pass, or an error?

Status and error codes: Amazon S3 API Reference, "Error responses". `Content-Range`: RFC 9110, section 14.4.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import h11
from botocore import exceptions as aws

from ray_streamer.errors import (
    AccessError,
    ObjectChangedError,
    ObjectMissingError,
    ShortReadError,
    StorageError,
    ThrottledError,
)
from ray_streamer.extent import Extent
from ray_streamer.storage.lateness import LateBodyError
from ray_streamer.storage.retry import PassingFault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray_streamer.storage.http_connection import HttpAnswer

_MAX_ERROR_BYTES = 64 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_THROTTLE_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServiceUnavailable"}
)
_TOKEN_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_NO_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile by s3_profile or AWS_PROFILE, or run where a role "
    "is attached; for a public bucket set s3_unsigned=True"
)
_NOBODY_THERE = (ConnectionRefusedError, socket.gaierror, aws.EndpointConnectionError)
_CREDENTIALS_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer other than success.

    Attributes:
        status: HTTP status.
        code: S3's word for it; empty when the answer had no body.
        request_id: What the server's operator can look up.
        region: Where the bucket is, when the server said so.
        retry_after: The server's wish about the next attempt, as it came.
    """

    status: int
    code: str
    request_id: str
    region: str
    retry_after: str = ""

    @classmethod
    def from_answer(cls, answer: HttpAnswer) -> Refusal:
        """What a raw answer says; reads its body, of which S3's message is left out since it may quote the request."""
        body = answer.read(_MAX_ERROR_BYTES)
        code = re.search(rb"<Code>\s*([\w.]+)\s*</Code>", body)
        region = re.search(rb"<Region>\s*([\w-]+)\s*</Region>", body)
        return cls(
            status=answer.status,
            code=code[1].decode() if code else "",
            request_id=answer.header("x-amz-request-id"),
            region=answer.header("x-amz-bucket-region") or (region[1].decode() if region else ""),
            retry_after=answer.header("retry-after"),
        )

    @classmethod
    def from_client_error(cls, error: aws.ClientError) -> Refusal:
        """What an answer says that botocore read."""
        response: Mapping[str, Any] = error.response
        metadata = response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        code = str(response.get("Error", {}).get("Code", ""))
        return cls(
            status=int(metadata.get("HTTPStatusCode", 0)),
            # Of an answer without a body botocore makes the status the code.
            code="" if code.isdigit() else code,
            request_id=str(metadata.get("RequestId", headers.get("x-amz-request-id", ""))),
            region=str(headers.get("x-amz-bucket-region", "")),
            retry_after=str(headers.get("retry-after", "")),
        )

    def error(self, what: str) -> StorageError | PassingFault:
        """The exception to raise for an answer about `what`."""
        message = f"{what}: {self}"
        if self.status in (401, 403) or self.code in _TOKEN_CODES:
            # A signature may have expired, or credentials may have changed, since the url was made.
            return PassingFault(f"access refused, {message}", error_class=AccessError, is_worth_one_retry=True)
        if self.status == 429 or self.code in _THROTTLE_CODES or self.status == 503:
            return PassingFault(
                f"the store asks to slow down, {message}",
                error_class=ThrottledError,
                retry_after_seconds=_seconds_until(self.retry_after),
            )
        if self.status in (408, 500, 502, 504) or self.code in ("RequestTimeout", "InternalError"):
            return PassingFault(f"the store failed, {message}")
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
        return StorageError(f"the store refused, {message}")

    def __str__(self) -> str:
        return f"HTTP {self.status} {self.code or 'without a code'}, request id {self.request_id or 'unknown'}"


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Which part of an object a body is.

    Attributes:
        extent: The bytes of the body.
        size_bytes: Length of the whole object.
    """

    extent: Extent
    size_bytes: int

    @classmethod
    def parse(cls, header: str | None) -> ContentRange | None:
        """The header's meaning, or None when it has none.

        >>> ContentRange.parse("bytes 8-23/100")
        ContentRange(extent=Extent(start=8, stop=24), size_bytes=100)
        """
        match = _CONTENT_RANGE.fullmatch(header or "")
        if match is None or not int(match[1]) <= int(match[2]) < int(match[3]):
            return None
        return cls(Extent(int(match[1]), int(match[2]) + 1), int(match[3]))


def range_of(answer: HttpAnswer, *, asked: Extent, etag: str | None, what: str) -> ContentRange:
    """Which bytes a 206 answer brings: those asked for, up to the end of the object.

    Raises:
        StorageError: The server answered with other bytes.
        ObjectChangedError: It overlooked `If-Match`.
    """
    given = ContentRange.parse(answer.header("content-range"))
    if answer.status != 206 or given is None:
        raise StorageError(
            f"{what}: expected 206 with a Content-Range, got {answer.status} with "
            f"{answer.header('content-range')!r}; the server or a proxy ignores ranges"
        )
    got_etag = answer.header("etag")
    if etag and got_etag and got_etag != etag:
        raise ObjectChangedError(f"{what}: the object is not the one that the index saw: ETag {got_etag}, not {etag}")
    if given.extent != Extent(asked.start, min(asked.stop, given.size_bytes)):
        raise StorageError(f"{what}: the server answered with other bytes, {given.extent} of {given.size_bytes}")
    if answer.length not in (None, given.extent.num_bytes):
        raise StorageError(
            f"{what}: the server announced {answer.length} bytes for {given.extent.num_bytes} bytes of the object"
        )
    return given


def _seconds_until(retry_after: str) -> float:
    """The meaning of a Retry-After header, seconds or a date (RFC 9110, section 10.2.3); 0 when it has none."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


@contextmanager
def faults_translated(what: str, *, endpoint: str, has_answered: bool) -> Iterator[None]:
    """Turn what sockets, TLS and botocore say about `what` into `PassingFault` or this package's errors.

    Args:
        what: Object and extent, for messages.
        endpoint: Where requests go, for messages.
        has_answered: Whether the endpoint ever answered; if not, a refused connection is taken for a wrong address.
    """
    try:
        yield
    except (StorageError, LateBodyError):
        # These are OSErrors too, some of them.
        raise
    except aws.ClientError as error:
        raise Refusal.from_client_error(error).error(what) from error
    except (aws.SSLError, ssl.SSLCertVerificationError) as error:
        raise StorageError(f"{endpoint} is not trusted, {what}: {_reason(error)}; set s3_ca_bundle") from error
    except (aws.HTTPClientError, aws.ConnectionError, OSError, h11.RemoteProtocolError) as error:
        message = f"no answer from {endpoint}, {what}: {_reason(error)}"
        if isinstance(error, _NOBODY_THERE) and not has_answered:
            raise StorageError(f"{message}; is s3_endpoint_url right, and the proxy if there is one?") from error
        raise PassingFault(message) from error
    except _CREDENTIALS_ERRORS as error:
        raise AccessError(f"no AWS credentials for {what} ({_reason(error)}): {_NO_CREDENTIALS}") from error
    except aws.BotoCoreError as error:
        raise StorageError(f"boto3 cannot ask for {what}: {error}") from error


def _reason(error: Exception) -> str:
    """The kind of an error and its own words, unless these could quote a signed url."""
    words = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
